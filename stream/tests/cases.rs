//! The test driver's cases as data: every file of `script/cases` gives what it says, with any number of tasks, in any order
//! of work, and with a crash before any step of any commit.

mod script;

use script::{Driver, cases, rows};
use tidemill_stream::testing::DriveError;

#[test]
fn every_case_gives_what_it_says() -> Result<(), DriveError> {
    let write = std::env::var("TIDEMILL_GOLDEN").is_ok_and(|v| v == "write");
    let mut differ = Vec::new();
    for case in cases() {
        let ran = case.record(case.driver(case.tasks)?)?;
        if write {
            std::fs::write(&case.path, &ran.text).expect("the folder can be written");
        } else if ran.text != case.text {
            differ.push(format!("{}:\n{}", case.path.display(), ran.text));
        }
    }
    assert!(differ.is_empty(), "what comes out (TIDEMILL_GOLDEN=write writes it):\n{}", differ.join("\n"));
    Ok(())
}

#[test]
fn any_number_of_tasks_in_any_order_gives_the_same_rows() -> Result<(), DriveError> {
    for case in cases().into_iter().filter(|case| !case.text.contains("> hour")) {
        let expected = case.record(case.driver(case.tasks)?)?.rows;
        for (tasks, seed) in [(1, None), (3, Some(1)), (2, Some(2))] {
            let mut driver = case.driver(tasks)?;
            if let Some(seed) = seed {
                driver = driver.seed(seed);
            }
            case.play(&mut driver)?;
            assert_eq!(rows(&driver), expected, "{} with {tasks} tasks, {seed:?}", case.name);
        }
    }
    Ok(())
}

#[test]
fn a_crash_before_any_step_gives_the_same_rows() -> Result<(), DriveError> {
    let mut crashes = 0;
    for case in cases().into_iter().filter(|case| case.crashes && !case.text.contains("> hour")) {
        let play = |driver: &mut Driver| case.play(driver);
        Driver::each_crash(
            || case.driver(case.tasks),
            play,
            |undisturbed, crashed, (step, nth)| {
                crashes += 1;
                assert_eq!(
                    rows(crashed),
                    rows(undisturbed),
                    "{}: before {step:?}, the {nth}. time",
                    case.name
                );
                Ok(())
            },
        )?;
    }
    assert!(crashes > 100, "{crashes}");
    Ok(())
}
