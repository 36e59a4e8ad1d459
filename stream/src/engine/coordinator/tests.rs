//! Golden scripts: events in, actions out. Claim first, output below; `TIDEMILL_GOLDEN=write` regenerates the file.

use std::fmt::Write as _;
use std::sync::Arc;
use std::time::Duration;

use super::*;
use crate::codec::Text;
use crate::dsl::{Flow, topic};
use crate::engine::recovery::{self, Setup};
use crate::engine::{Layout, PartitionSnapshot};
use crate::io::{Cleanup, Log, NewTopic};
use crate::names::Identity;
use crate::plan::{Job, Plan, SinkId};
use crate::state::{CellBatchBuilder, MemoryState};
use crate::testing::MemoryLog;
use crate::time::{END, EventTime, Tumbling};

struct Count;
impl Job for Count {
    const NAME: &'static str = "count";
    fn build(&self, flow: &Flow) -> crate::Result<()> {
        flow.source(topic("in"), Text)
            .event_time(|line| line.len() as i64, EventTime::out_of_order(Duration::ZERO))
            .key_by(|line| line.clone())
            .window(Tumbling::of(Duration::from_millis(10)))
            .count("n")
            .drop_late()
            .map(|w| w.value)
            .to(topic("out"), Text);
        Ok(())
    }
}

struct Script {
    coordinator: Coordinator,
    text: String,
    now: i64,
}

impl Script {
    fn new(claim: &str, mode: Mode) -> Self {
        let log = MemoryLog::default();
        log.create_topic(&NewTopic { name: "in".into(), partitions: 1, cleanup: Cleanup::Delete }).unwrap();
        let plan = Plan::of(&Count).unwrap();
        let layout = Layout { shards: 1, sources: 1, keyed: 1, ..Layout::new(&plan, 1, 1 << 20) };
        let setup = Setup { plan, identity: Identity::new("count").unwrap(), layout, mode };
        let mut start = recovery::start(&setup, &log, &MemoryState::default()).unwrap().start;
        start.job_record = None;
        let policy = CommitPolicy { write_bytes_max: 0, flush_records_max: 6, ..CommitPolicy::default() };
        Self { coordinator: Coordinator::new(start, policy), text: format!("# {claim}\n"), now: 1_000 }
    }

    fn event(&mut self, name: &str, event: Event) -> &mut Self {
        writeln!(self.text, "> {name}").unwrap();
        self.coordinator.handle(event, self.now).unwrap();
        while let Some(action) = self.coordinator.next_action() {
            let text = match action {
                Action::Barrier { epoch, last } => format!("barrier {epoch} {last:?}"),
                Action::Send { via, topic, partition, payload, step } => {
                    let what = match payload {
                        Payload::Records(records) => format!("{} records", records.len()),
                        Payload::Cells(cells, _) => format!("{} cells", cells.len()),
                    };
                    format!(
                        "send {}{}/{partition} {what}{}",
                        if via == Via::Outside { "outside " } else { "" },
                        topic.name,
                        step.map_or("", |_| ", of the commit")
                    )
                }
                Action::Offsets(offsets) => {
                    let offset = |o: &OffsetCommit| {
                        let mark = PartitionMark::decode(&o.metadata).unwrap();
                        format!(
                            "p{}@{} time {} floor {}",
                            o.partition, o.position.offset, mark.watermark, mark.floor
                        )
                    };
                    format!("offsets {}", offsets.iter().map(offset).collect::<Vec<_>>().join(", "))
                }
                Action::End => "end".to_owned(),
                Action::Committed { epoch } => format!("tell tasks: {epoch} is committed"),
                Action::Write(b) => format!(
                    "write to {}: {} cells, {} marks, {} positions, windows to {} skipped{}",
                    b.epoch,
                    b.cells.iter().map(|c| c.len()).sum::<usize>(),
                    b.marks.len(),
                    b.positions.len(),
                    b.closed[0].1,
                    if b.purge.is_empty() { "" } else { " and purged" },
                ),
                Action::Flush => "flush".to_owned(),
                Action::Applied { epoch } => format!("tell tasks: {epoch} is in the store"),
                Action::Restart => "restart".to_owned(),
                Action::Done(s) => format!(
                    "done: {} epochs, {} rows, early {:?}",
                    s.epochs, s.committed_rows, s.closed_early
                ),
            };
            writeln!(self.text, "  {text}").unwrap();
        }
        self
    }

    fn output(&mut self, epoch: u64) -> &mut Self {
        let record = OutRecord { timestamp: 0, key: None, value: Some("x".into()), headers: Vec::new() };
        let batches = vec![OutBatch { sink: SinkId(0), partition: 0, records: vec![record] }];
        self.event(&format!("output of {epoch}"), Event::Output { epoch, batches })
    }

    fn snapshots(
        &mut self,
        epoch: u64,
        offset: i64,
        cell: Option<i64>,
        closed: i64,
        reached: i64,
    ) -> &mut Self {
        let position = Position { leader_epoch: 1, offset };
        let partitions = vec![PartitionSnapshot { partition: 0, position, watermark: offset }];
        let source =
            SourceSnapshot { task: 0, epoch, partitions, floor: reached.min(offset), joins: Vec::new() };
        self.event("the source task's snapshot", Event::Source(source));
        let mut builder = CellBatchBuilder::default();
        if let Some(end) = cell {
            builder.push(end, b"k", |to| to.push(1));
        }
        let cells = builder.finish(StoreId(1), Shard(0)).map(Arc::new).into_iter().collect();
        let marks = Marks { fired: closed, closed };
        let closed_early = if reached == END { vec![closed] } else { Vec::new() };
        let keyed = KeyedSnapshot { task: 0, epoch, reached, marks, cells, closed_early };
        self.event("the keyed task's snapshot", Event::Keyed(keyed))
    }

    fn committed(&mut self) -> &mut Self {
        let changelogs = self.coordinator.start.changelogs.clone().unwrap();
        let position = Position { leader_epoch: 1, offset: 9 };
        let positions = vec![(changelogs.windows, 0, position), (changelogs.keyed, 0, position)];
        self.event("committed", Event::Ended(Ended::Committed(positions)))
    }

    fn later(&mut self, millis: i64) -> &mut Self {
        self.now += millis;
        self.event(&format!("{millis} ms later"), Event::Tick)
    }
}

fn scripts() -> String {
    let mut all = Vec::new();
    let mut add = |script: &mut Script| all.push(std::mem::take(&mut script.text));

    let mut s = Script::new(
        "Output enters the open transaction as it arises; the next epoch's is held while this one ends.",
        Mode::Unbounded,
    );
    s.later(0).output(1).later(1).output(1).output(2).snapshots(1, 5, Some(20), MIN, 4).output(2).later(500);
    s.committed()
        .event("written", Event::Written { epoch: 1 })
        .later(200)
        .snapshots(2, 8, Some(20), 10, 11)
        .committed();
    add(&mut s);

    let mut s = Script::new(
        "The first commit of a start comes with its first output, however many empty epochs went before; others are due by time.",
        Mode::Unbounded,
    );
    s.coordinator.offsets.insert(0, Position { leader_epoch: 1, offset: 5 });
    s.later(0).later(200).snapshots(1, 5, None, MIN, 4);
    s.later(150).output(2).later(10).snapshots(2, 5, Some(20), MIN, 4).committed();
    s.output(3).later(199).later(1);
    add(&mut s);

    let mut s = Script::new("An epoch that changed nothing commits nothing.", Mode::Unbounded);
    s.event("commit", Event::Commit).snapshots(1, 5, None, MIN, 4).committed();
    s.event("commit", Event::Commit).snapshots(2, 5, None, MIN, 4).output(3).event("commit", Event::Commit);
    add(&mut s);

    let mut s = Script::new(
        "An unknown outcome is asked for; an abort kills the next epoch, and what is committed is written first.",
        Mode::Unbounded,
    );
    s.coordinator.policy = CommitPolicy::default();
    s.event("commit", Event::Commit).snapshots(1, 5, Some(20), MIN, 4).committed();
    s.event("commit", Event::Commit).snapshots(2, 6, Some(20), MIN, 5).output(3);
    s.event("unknown", Event::Ended(Ended::Unknown)).event("aborted", Event::Ended(Ended::Aborted));
    add(&mut s);

    let mut s = Script::new(
        "The store is written after a commit, purged once it holds closed windows, and flushed when enough is unflushed.",
        Mode::Unbounded,
    );
    s.event("commit", Event::Commit)
        .snapshots(1, 1, Some(10), MIN, 4)
        .committed()
        .event("written", Event::Written { epoch: 1 });
    s.event("commit", Event::Commit)
        .snapshots(2, 2, Some(20), 10, 14)
        .committed()
        .event("written", Event::Written { epoch: 2 });
    s.event("flushed", Event::Flushed);
    add(&mut s);

    let mut s =
        Script::new("A stop is one more commit, then the store is brought up to date.", Mode::Unbounded);
    s.output(1).event("stop", Event::Stop).snapshots(1, 5, Some(20), MIN, 4).committed();
    s.event("written", Event::Written { epoch: 1 }).event("flushed", Event::Flushed);
    add(&mut s);

    let mut s = Script::new(
        "The end of a bounded run commits even an empty epoch, and never stores plus infinity.",
        Mode::UntilEnd,
    );
    s.event("the source task has finished", Event::Finished { task: 0 })
        .output(1)
        .snapshots(1, 5, None, 20, END)
        .committed();
    s.event("written", Event::Written { epoch: 1 }).event("flushed", Event::Flushed);
    add(&mut s);

    let mut s = Script::new("Pressure commits at once and writes what may be written.", Mode::Unbounded);
    s.later(0)
        .event("pressure", Event::Pressure)
        .snapshots(1, 5, Some(20), MIN, 4)
        .event("pressure", Event::Pressure)
        .committed();
    add(&mut s);

    let mut s = Script::new(
        "What a task under pressure waits for is written as soon as it is committed, however little it is.",
        Mode::Unbounded,
    );
    s.coordinator.policy = CommitPolicy::default();
    s.later(0).event("pressure", Event::Pressure).snapshots(1, 5, Some(20), MIN, 4).committed();
    s.event("pressure", Event::Pressure).snapshots(2, 6, Some(20), MIN, 5);
    s.event("written", Event::Written { epoch: 1 }).committed();
    s.event("written", Event::Written { epoch: 2 });
    s.event("commit", Event::Commit).snapshots(3, 7, Some(20), MIN, 6).committed();
    add(&mut s);

    let mut s = Script::new(
        "Pressure while a barrier is on its way waits for no later epoch, which may be empty.",
        Mode::Unbounded,
    );
    s.coordinator.policy = CommitPolicy::default();
    s.event("commit", Event::Commit).event("pressure", Event::Pressure);
    s.snapshots(1, 5, Some(20), MIN, 4).committed().snapshots(2, 5, None, MIN, 4);
    add(&mut s);
    all.join("\n")
}

#[test]
fn the_golden_scripts_hold() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/src/engine/coordinator/golden.txt");
    let have = scripts();
    if std::env::var("TIDEMILL_GOLDEN").is_ok_and(|v| v == "write") {
        std::fs::write(path, &have).unwrap();
    }
    let want = std::fs::read_to_string(path).unwrap();
    assert!(have == want, "the scripts changed (TIDEMILL_GOLDEN=write regenerates them):\n{have}");
}

#[test]
fn the_table_of_steps_is_in_order_and_numbered_from_one() {
    for (i, row) in COMMIT_STEPS.iter().enumerate() {
        assert_eq!(row.step as usize, i + 1);
        assert!(!row.does.is_empty() && !row.crash_before.is_empty());
    }
}
