//! One data directory, many processes: whoever owns it may die, stop, or close, and the others go on.
//!
//! Children are this very test binary, told by the environment to play a part: the case named [`part`]. They talk to
//! the test by lines that begin with `@`, on standard output, and end when their standard input does.

mod common;

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use common::{PATIENCE, batch, fetch, plain, read_all, send, topic, within};
use rustix::process::{Pid, Signal, WaitOptions, kill_process, waitpid};
use tidemill_broker::*;
use tidemill_log::batch::RecordParts;

const PART: &str = "TIDEMILL_TEST_PART";
const DIR: &str = "TIDEMILL_TEST_DIR";
const NAME: &str = "TIDEMILL_TEST_NAME";
const COUNT: &str = "TIDEMILL_TEST_COUNT";

/// A child process and what it says.
struct Player {
    child: Child,
    stdin: Option<ChildStdin>,
    lines: mpsc::Receiver<String>,
}

impl Player {
    fn start(part: &str, dir: &Path, name: &str, count: u64) -> Player {
        let mut child = Command::new(std::env::current_exe().expect("a path"))
            .args(["part", "--exact", "--nocapture", "--test-threads=1"])
            .env(PART, part)
            .env(DIR, dir)
            .env(NAME, name)
            .env(COUNT, count.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("starts");
        let (sender, lines) = mpsc::channel();
        let stdout = BufReader::new(child.stdout.take().expect("piped"));
        std::thread::spawn(move || {
            for line in stdout.lines().map_while(Result::ok) {
                // libtest writes its own words on the same stream, and not always a line of its own.
                if let Some((_, said)) = line.split_once('@')
                    && sender.send(said.to_owned()).is_err()
                {
                    return;
                }
            }
        });
        let stdin = child.stdin.take();
        Player { child, stdin, lines }
    }

    fn pid(&self) -> u32 {
        self.child.id()
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).expect("it lives");
    }

    /// The next line that begins with `word`, without it.
    fn hear(&self, word: &str) -> String {
        loop {
            let line = self.lines.recv_timeout(3 * PATIENCE).unwrap_or_else(|e| panic!("no {word:?}: {e}"));
            if let Some(rest) = line.strip_prefix(word) {
                return rest.trim().to_owned();
            }
        }
    }

    /// Lets it end by itself.
    fn finish(mut self) {
        drop(self.stdin.take());
        assert!(self.child.wait().expect("ends").success());
    }
}

impl Drop for Player {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn say(line: &str) {
    let mut out = std::io::stdout().lock();
    writeln!(out, "\n@{line}").and_then(|()| out.flush()).expect("the test listens");
}

/// What a child does. Without the environment it is an empty case.
#[test]
fn part() {
    let Ok(part) = std::env::var(PART) else { return };
    let dir = PathBuf::from(std::env::var(DIR).expect("set"));
    let name = std::env::var(NAME).expect("set");
    let count: u64 = std::env::var(COUNT).expect("set").parse().expect("a number");
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async {
        let options = AccessOptions::new(Intent::Create).on_event(|event| say(&format!("event {event}")));
        let access = Access::open(&dir, options).await.expect("opens");
        say(&format!("place {:?}", access.place().expect("up")));
        if part == "produce" {
            produce(&access, &name, count).await;
        }
        if part != "produce-and-go" {
            // Until the test lets go, or kills.
            tokio::task::spawn_blocking(|| std::io::stdin().read_to_end(&mut Vec::new()))
                .await
                .unwrap()
                .unwrap();
        } else {
            produce(&access, &name, count).await;
        }
        access.close().await;
    });
}

/// `count` records `<name> <n>` to one partition in small batches; says how far it is.
async fn produce(access: &Access, name: &str, count: u64) {
    let topic = access.create_topic(NewTopic::new("t", 2).keep_existing()).await.expect("a topic");
    let options = ProducerOptions {
        batch_bytes_max: 256,
        memory_bytes_max: 4 << 10,
        linger: Duration::ZERO,
        ..ProducerOptions::default()
    };
    let producer = Producer::open(access.clone(), options).await.expect("a producer");
    for n in 0..count {
        let value = format!("{name} {n}");
        let record = RecordParts { value: Some(value.as_bytes()), ..RecordParts::default() };
        let partition = u32::try_from(n % 2).unwrap();
        let _ack = producer.send(&topic, Some(partition), record).await.expect("takes it");
        if n % 200 == 199 {
            say(&format!("acked {}", producer.durable_prefix().durable));
        }
    }
    let prefix = producer.close().await.expect("all of it is acked");
    say(&format!("done {}", prefix.durable));
}

/// What each producer wrote, in the order of the log, by name and partition.
async fn written(access: &Access) -> BTreeMap<(String, u32), Vec<u64>> {
    let broker = access.broker();
    let topic = broker.describe("t".into()).await.expect("a topic").topic;
    let mut written: BTreeMap<(String, u32), Vec<u64>> = BTreeMap::new();
    for partition in 0..topic.partitions {
        for value in read_all(&broker, topic.partition(partition), Isolation::ReadCommitted).await {
            let (name, n) = value.split_once(' ').expect("a name and a number");
            written.entry((name.to_owned(), partition)).or_default().push(n.parse().expect("a number"));
        }
    }
    written
}

fn all_of(count: u64, partition: u64) -> Vec<u64> {
    (0..count).filter(|n| n % 2 == partition).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_owner_that_is_killed_costs_nobody_a_record() {
    const COUNT: u64 = 4000;
    let dir = tempfile::tempdir().unwrap();
    let mut owner = Player::start("produce", dir.path(), "a", 1_000_000);
    assert_eq!(owner.hear("place"), "Here");
    let players: Vec<Player> =
        ["b", "c"].iter().map(|name| Player::start("produce", dir.path(), name, COUNT)).collect();
    for player in &players {
        assert_eq!(player.hear("place"), format!("Process({})", owner.pid()));
        player.hear("acked");
    }
    let acked: u64 = owner.hear("acked").parse().unwrap();
    owner.child.kill().unwrap();
    owner.child.wait().unwrap();
    for player in &players {
        assert_eq!(player.hear("done"), COUNT.to_string());
    }
    // One of them is the owner now. It goes in order, then the other, which owns it last.
    players.into_iter().for_each(Player::finish);
    let access = Data::open(dir.path(), Intent::Use).await.unwrap();
    assert_eq!(access.place(), Some(Place::Here));
    let written = within(written(&access)).await;
    for partition in 0..2 {
        for name in ["b", "c"] {
            let mine = &written[&(name.to_owned(), partition)];
            assert_eq!(*mine, all_of(COUNT, partition.into()), "{name} in {partition}");
        }
        let killed = &written[&("a".to_owned(), partition)];
        assert_eq!(*killed, all_of(killed.len() as u64 * 2, partition.into()), "a prefix, in order, once");
        assert!(killed.len() as u64 >= acked / 2, "nothing acked is lost");
    }
    access.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stopped_owner_is_named_and_may_go_on() {
    let dir = tempfile::tempdir().unwrap();
    let owner = Player::start("own", dir.path(), "a", 0);
    assert_eq!(owner.hear("place"), "Here");
    let (sender, mut events) = tokio::sync::mpsc::unbounded_channel();
    let options = AccessOptions::new(Intent::Use).on_event(move |event| drop(sender.send(event.clone())));
    let early = Access::open(dir.path(), options).await.unwrap();
    owner.signal(Signal::STOP);
    waitpid(Some(Pid::from_child(&owner.child)), WaitOptions::UNTRACED).expect("a child").expect("it stops");
    let begun = std::time::Instant::now();
    let late = within(Data::open(dir.path(), Intent::Use));
    let call = within(early.topics());
    let (late, call) = tokio::join!(late, call);
    assert!(begun.elapsed() >= Duration::from_secs(4), "silence is given its time");
    let pid = format!("process {} owns", owner.pid());
    assert!(matches!(&late, Err(AccessError::Silent { pid, .. }) if *pid == owner.pid()), "{late:?}");
    assert!(matches!(&call, Err(BrokerError::Unavailable { what }) if what.contains(&pid)), "{call:?}");
    owner.signal(Signal::CONT);
    // The link comes back with the first byte.
    while !matches!(within(events.recv()).await, Some(AccessEvent::Back { pid }) if pid == owner.pid()) {}
    assert_eq!(within(early.topics()).await, Ok(vec![]));
    owner.finish();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn processes_that_race_for_a_directory_all_get_their_records_in() {
    let dir = tempfile::tempdir().unwrap();
    let names = ["a", "b", "c", "d", "e"];
    let players = names.map(|name| Player::start("produce-and-go", dir.path(), name, 600));
    for player in &players {
        assert_eq!(player.hear("done"), "600");
    }
    players.into_iter().for_each(Player::finish);
    let access = Data::open(dir.path(), Intent::Use).await.unwrap();
    let written = within(written(&access)).await;
    for name in names {
        for partition in 0..2 {
            assert_eq!(written[&(name.to_owned(), partition)], all_of(600, partition.into()), "{name}");
        }
    }
    access.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_owner_that_closes_hands_over_in_the_middle_of_requests() {
    let dir = tempfile::tempdir().unwrap();
    let first = Data::open(dir.path(), Intent::Create).await.unwrap();
    let second = Data::open(dir.path(), Intent::Use).await.unwrap();
    assert_eq!(first.place(), Some(Place::Here));
    assert!(matches!(second.place(), Some(Place::Process(_))));
    let tp = topic(&second.broker(), "t", 1).await.partition(0);
    // A fetch that waits outlives the owner that it was sent to.
    let waiting = tokio::spawn({
        let broker = second.broker();
        async move {
            let position = Position::START;
            loop {
                let wait = Duration::from_secs(10);
                let (values, ..) =
                    fetch(&broker, tp, position, Isolation::ReadCommitted, wait).await.expect("goes on");
                if !values.is_empty() {
                    return values;
                }
            }
        }
    });
    within(first.close()).await;
    assert_eq!(first.place(), None);
    let broker = second.broker();
    let who = plain(&broker).await;
    assert_eq!(second.place(), Some(Place::Here));
    send(&broker, who, tp, batch(who, 0, false, &["x"])).await.unwrap();
    assert_eq!(within(waiting).await.unwrap(), ["x"]);
    let closed = within(first.topics()).await;
    assert!(matches!(closed, Err(BrokerError::Unavailable { .. })), "{closed:?}");
    within(second.close()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_path_longer_than_a_socket_address_works() {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path().join("d".repeat(120)).join("e".repeat(120));
    let owner = Data::open(&dir, Intent::Create).await.unwrap();
    let guest = Data::open(&dir, Intent::Use).await.unwrap();
    assert!(matches!(guest.place(), Some(Place::Process(_))));
    topic(&guest.broker(), "t", 1).await;
    guest.close().await;
    owner.close().await;
    assert!(!dir.join("sock").exists(), "an orderly owner takes its socket's name away");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_socket_is_the_owners_alone() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    let owner = Data::open(dir.path(), Intent::Create).await.unwrap();
    let mode = std::fs::metadata(dir.path().join("sock")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    assert!(!dir.path().join(".sock.new").exists());
    owner.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_directory_that_does_not_open_says_why() {
    let dir = tempfile::tempdir().unwrap();
    Data::open(dir.path(), Intent::Create).await.unwrap().close().await;
    std::fs::write(dir.path().join("format"), b"not a format").unwrap();
    let failed = within(Data::open(dir.path(), Intent::Use)).await;
    let Err(AccessError::Owner(OwnerError::Open { why, .. })) = &failed else { panic!("{failed:?}") };
    assert!(!why.is_empty());
    // The failed owner let go of everything.
    let again = within(Data::open(dir.path(), Intent::Use)).await;
    assert!(matches!(again, Err(AccessError::Owner(_))), "{again:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transaction_outlives_the_owner_it_was_begun_with() {
    let dir = tempfile::tempdir().unwrap();
    let mut owner = Player::start("own", dir.path(), "a", 0);
    assert_eq!(owner.hear("place"), "Here");
    let access = Data::open(dir.path(), Intent::Use).await.unwrap();
    let broker = access.broker();
    let topic = topic(&broker, "t", 2).await;
    let options = TransactionalOptions::default();
    let mut producer = TransactionalProducer::open(access.clone(), "job", options).await.unwrap();
    let value = |value: &'static str| RecordParts { value: Some(value.as_bytes()), ..RecordParts::default() };
    let _ack = within(producer.send(&topic, Some(0), value("before"))).await.unwrap();
    let offset =
        GroupOffset { partition: topic.partition(1), position: Position::START, metadata: "with it".into() };
    within(producer.add_offsets("g", vec![offset.clone()])).await.unwrap();
    within(producer.flush()).await.unwrap();
    owner.child.kill().unwrap();
    owner.child.wait().unwrap();
    // Acked and open: the next owner, this process, recovers it open, and its producer goes on.
    let _ack = within(producer.send(&topic, Some(0), value("after"))).await.unwrap();
    let _ack = within(producer.send(&topic, Some(1), value("elsewhere"))).await.unwrap();
    within(producer.flush()).await.unwrap();
    assert_eq!(access.place(), Some(Place::Here));
    let unseen = read_all(&broker, topic.partition(0), Isolation::ReadCommitted).await;
    assert_eq!(unseen, [""; 0]);
    assert_eq!(within(producer.commit()).await, Ok(Outcome::Committed));
    let seen = read_all(&broker, topic.partition(0), Isolation::ReadCommitted).await;
    assert_eq!(seen, ["before", "after"]);
    let found =
        within(broker.fetch_offsets(FetchOffsets { group: "g".into(), stable: Stable::Wait(5000) })).await;
    assert_eq!(found.unwrap().offsets, [offset]);
    access.close().await;
}
