//! One suite for every way to a broker: what is promised must not depend on where it runs.

mod common;

use std::time::Duration;

use bytes::Bytes;
use common::*;
use tidemill_broker::*;
use tidemill_rpc::Attachment;

/// Each case runs in process, through the stub over TCP, and through the stub over a Unix socket.
macro_rules! suite {
    ($($(#[$meta:meta])* $case:ident;)*) => {
        mod in_process {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $case() { super::$case(&super::Local::new().await).await })*
        }
        mod over_tcp {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $case() { super::$case(&super::Tcp::new().await).await })*
        }
        mod over_unix {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $case() { super::$case(&super::Unix::new().await).await })*
        }
    };
}

suite! {
    topics_are_created_listed_and_described;
    topics_are_deleted_and_their_names_used_again;
    a_topic_in_use_is_deleted_only_on_demand;
    topics_are_altered;
    positions_are_found_by_time;
    appended_batches_come_back_byte_for_byte;
    a_batch_sent_twice_is_there_once;
    sequences_out_of_order_move_nothing;
    one_refused_partition_does_not_refuse_the_others;
    a_waiting_fetch_is_woken_by_an_append;
    a_waiting_fetch_ends_at_its_deadline;
    a_commit_shows_everything_at_once;
    an_abort_shows_nothing;
    an_init_fences_and_aborts;
    a_retried_end_is_told_the_same;
    a_late_request_of_an_ended_transaction_is_fenced;
    a_retried_init_is_answered_alike_and_a_stale_one_is_fenced;
    a_transaction_that_takes_too_long_is_aborted;
    offsets_are_pending_until_the_end;
    offsets_outside_a_transaction_are_committed_at_once;
    positions_that_do_not_hold_are_refused;
    requests_count_on_the_newest_connection_only;
    clients_carry_records_from_end_to_end;
    a_transactional_client_commits_and_aborts;
}

async fn topics_are_created_listed_and_described(host: &impl Host) {
    let broker = host.connect().await;
    let b = topic(&broker, "b", 3).await;
    let a = topic(&broker, "a", 1).await;
    assert_ne!(a.id, b.id);
    assert_eq!(within(broker.topics()).await.unwrap(), [a.clone(), b.clone()]);
    let again = within(broker.create_topic(NewTopic::new("b", 5))).await;
    assert_eq!(again, Err(BrokerError::TopicExists { topic: "b".into() }));
    assert_eq!(within(broker.create_topic(NewTopic::new("b", 5).keep_existing())).await, Ok(b.clone()));
    let bad = within(broker.create_topic(NewTopic::new("no/slash", 1))).await;
    assert!(matches!(bad, Err(BrokerError::Invalid { .. })), "{bad:?}");
    let described = within(broker.describe("b".into())).await.unwrap();
    assert_eq!((described.topic, described.offsets.len()), (b, 3));
    assert!(described.offsets.iter().all(|o| (o.log_start, o.high_watermark, o.last_stable) == (0, 0, 0)));
    let unknown = within(broker.describe("c".into())).await;
    assert_eq!(unknown, Err(BrokerError::UnknownTopic { topic: "c".into() }));
}

async fn topics_are_deleted_and_their_names_used_again(host: &impl Host) {
    let (broker, reader) = (host.connect().await, host.connect().await);
    let old = topic(&broker, "t", 2).await;
    let who = plain(&broker).await;
    send(&broker, who, old.partition(0), batch(who, 0, false, &["old"])).await.unwrap();
    let tp = old.partition(0);
    let waiting = tokio::spawn(async move {
        let end = Position::unchecked(1);
        fetch(&reader, tp, end, Isolation::ReadCommitted, Duration::from_secs(15)).await
    });
    let request = DeleteTopic { topic: old.id, if_used: IfUsed::Refuse };
    assert_eq!(within(broker.delete_topic(request)).await, Ok(()));
    // Whoever waits for its next record is told.
    let told = within(waiting).await.unwrap();
    assert!(matches!(told, Err(BrokerError::UnknownPartition { .. })), "{told:?}");
    let gone = within(broker.describe("t".into())).await;
    assert_eq!(gone, Err(BrokerError::UnknownTopic { topic: "t".into() }));
    let new = topic(&broker, "t", 1).await;
    assert_ne!(new.id, old.id);
    // A late repeat of the request, and everything else that means the old one, does not touch the new one.
    assert_eq!(within(broker.delete_topic(request)).await, Ok(()));
    assert_eq!(within(broker.topics()).await, Ok(vec![new.clone()]));
    let stale =
        fetch(&broker, old.partition(0), Position::START, Isolation::ReadCommitted, Duration::ZERO).await;
    assert!(matches!(stale, Err(BrokerError::UnknownPartition { .. })), "{stale:?}");
    let stale = send(&broker, who, old.partition(0), batch(who, 1, false, &["late"])).await;
    assert!(matches!(stale, Err(BrokerError::UnknownPartition { .. })), "{stale:?}");
    let commit = CommitOffsets {
        group: "g".into(),
        transaction: None,
        offsets: vec![offset(old.partition(0), Position::unchecked(1), "")],
    };
    let stale = within(broker.commit_offsets(commit)).await;
    assert!(matches!(stale, Err(BrokerError::UnknownPartition { .. })), "{stale:?}");
    // Sequences begin again, and so do offsets.
    assert_eq!(send(&broker, who, new.partition(0), batch(who, 0, false, &["new"])).await, Ok((0, false)));
    assert_eq!(read_all(&broker, new.partition(0), Isolation::ReadCommitted).await, ["new"]);
}

async fn a_topic_in_use_is_deleted_only_on_demand(host: &impl Host) {
    let broker = host.connect().await;
    let (input, output) = (topic(&broker, "in", 1).await, topic(&broker, "out", 1).await);
    let delete = |topic: &Topic, if_used| {
        let request = DeleteTopic { topic: topic.id, if_used };
        within(broker.delete_topic(request))
    };
    let start = || vec![offset(input.partition(0), Position::START, "m")];
    let commit = CommitOffsets { group: "g".into(), transaction: None, offsets: start() };
    within(broker.commit_offsets(commit)).await.unwrap();
    let who = transactional(&broker, "job").await;
    send(&broker, who, output.partition(0), batch(who, 0, true, &["a"])).await.unwrap();
    let add = CommitOffsets {
        group: "h".into(),
        transaction: Some(TransactionalIdentity { transactional_id: "job".into(), producer: who }),
        offsets: start(),
    };
    within(broker.commit_offsets(add)).await.unwrap();
    let in_use = |topic: &str, groups: &[&str], transactions: &[&str]| {
        let owned = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect();
        let (groups, transactions) = (owned(groups), owned(transactions));
        Err(BrokerError::TopicInUse { topic: topic.to_owned(), groups, transactions })
    };
    assert_eq!(delete(&input, IfUsed::Refuse).await, in_use("in", &["g"], &["job"]));
    assert_eq!(delete(&output, IfUsed::Refuse).await, in_use("out", &[], &["job"]));
    assert_eq!(delete(&input, IfUsed::Delete).await, Ok(()));
    assert_eq!(delete(&output, IfUsed::Delete).await, Ok(()));
    assert_eq!(within(broker.topics()).await, Ok(vec![]));
    // The transaction goes on without them, and what it held of them is not committed.
    let other = topic(&broker, "other", 1).await;
    send(&broker, who, other.partition(0), batch(who, 0, true, &["b"])).await.unwrap();
    let ended = end(&broker, "job", who, End::Commit).await.unwrap();
    assert_eq!(ended.outcome, Outcome::Committed);
    assert_eq!(read_all(&broker, other.partition(0), Isolation::ReadCommitted).await, ["b"]);
    for group in ["g", "h"] {
        let request = FetchOffsets { group: group.into(), stable: Stable::Wait(15_000) };
        assert_eq!(within(broker.fetch_offsets(request)).await.unwrap().offsets, []);
    }
}

async fn topics_are_altered(host: &impl Host) {
    let broker = host.connect().await;
    let before = topic(&broker, "t", 1).await;
    let who = plain(&broker).await;
    send(&broker, who, before.partition(0), batch(who, 0, false, &["a"])).await.unwrap();
    let none = AlterTopic { topic: before.id, partitions: None, segment_bytes_max: None, cleanup: None };
    let alter = |request| within(broker.alter_topic(request));
    assert_eq!(alter(none).await, Ok(before.clone()));
    let more = AlterTopic { partitions: Some(3), segment_bytes_max: Some(1 << 20), ..none };
    let after = Topic { partitions: 3, segment_bytes_max: 1 << 20, ..before.clone() };
    assert_eq!(alter(more).await, Ok(after.clone()));
    assert_eq!(alter(more).await, Ok(after.clone()), "asked again");
    let fewer = alter(AlterTopic { partitions: Some(2), ..none }).await;
    assert!(
        matches!(&fewer, Err(BrokerError::Invalid { what }) if what.contains("cannot become 2")),
        "{fewer:?}"
    );
    let none_left = alter(AlterTopic { segment_bytes_max: Some(0), ..none }).await;
    assert!(matches!(none_left, Err(BrokerError::Invalid { .. })), "{none_left:?}");
    let compacted = alter(AlterTopic { cleanup: Some(Cleanup::Compact), ..none }).await;
    assert_eq!(compacted, Ok(Topic { cleanup: Cleanup::Compact, ..after }));
    let unknown = alter(AlterTopic { topic: TopicId(7), ..none }).await;
    assert!(matches!(unknown, Err(BrokerError::UnknownTopic { .. })), "{unknown:?}");
    // What was there is there, and the new partitions take records.
    send(&broker, who, before.partition(2), batch(who, 0, false, &["c"])).await.unwrap();
    assert_eq!(read_all(&broker, before.partition(0), Isolation::ReadCommitted).await, ["a"]);
    assert_eq!(read_all(&broker, before.partition(1), Isolation::ReadCommitted).await, [""; 0]);
    assert_eq!(read_all(&broker, before.partition(2), Isolation::ReadCommitted).await, ["c"]);
    assert_eq!(within(broker.describe("t".into())).await.unwrap().offsets.len(), 3);
}

async fn positions_are_found_by_time(host: &impl Host) {
    let broker = host.connect().await;
    let topic = topic(&broker, "t", 2).await;
    let tp = topic.partition(0);
    let who = plain(&broker).await;
    let mut sequence = 0;
    // Times of the records of each batch; the third batch is older than the second.
    for times in [&[10, 20, 15][..], &[30, 31], &[12, 25], &[40, 50, 60]] {
        let batch = timed(who, sequence, times);
        send(&broker, who, tp, batch).await.unwrap();
        sequence += i32::try_from(times.len()).unwrap();
    }
    let at = async |partition, time| {
        let request = ListOffsets { partitions: vec![partition], at: At::Time(time) };
        within(broker.list_offsets(request)).await.unwrap().offsets.remove(0)
    };
    for (time, offset) in
        [(i64::MIN, 0), (0, 0), (10, 0), (11, 1), (20, 1), (21, 3), (31, 4), (32, 7), (60, 9)]
    {
        let ListedOffset::Found(position) = at(tp, time).await else { panic!("time {time}") };
        assert_eq!(position.offset, offset, "time {time}");
        let read = fetch(&broker, tp, position, Isolation::ReadCommitted, Duration::ZERO).await;
        assert!(read.is_ok(), "the position of time {time} holds: {read:?}");
    }
    for time in [61, i64::MAX] {
        assert!(matches!(at(tp, time).await, ListedOffset::AllOlder(end) if end.offset == 10), "time {time}");
    }
    assert!(matches!(at(topic.partition(1), 0).await, ListedOffset::AllOlder(Position::START)));
    let ListedOffset::Refused(error) = at(topic.partition(9), 0).await else { panic!("no such partition") };
    assert!(matches!(error.into_error(), BrokerError::UnknownPartition { .. }));
}

async fn appended_batches_come_back_byte_for_byte(host: &impl Host) {
    let broker = host.connect().await;
    let tp = topic(&broker, "t", 1).await.partition(0);
    let who = plain(&broker).await;
    let (one, two) = (batch(who, 0, false, &["a", "b"]), batch(who, 2, false, &["c"]));
    assert_eq!(send(&broker, who, tp, one.clone()).await, Ok((0, false)));
    assert_eq!(send(&broker, who, tp, two.clone()).await, Ok((2, false)));
    let request = Fetch {
        partitions: vec![FetchPartition { partition: tp, position: Position::START, bytes_max: 1 << 20 }],
        bytes_max: 1 << 20,
        wait_ms_max: 0,
        isolation: Isolation::ReadCommitted,
    };
    let (fetched, attachment) = within(broker.fetch(request)).await.unwrap();
    let bytes = attachment.into_bytes();
    assert_eq!(fetched.partitions[0].bytes as usize, bytes.len());
    assert_eq!(fetched.partitions[0].next.offset, 3);
    // From the crc on (byte 17) not a bit differs; before it the log puts the offset and the leader epoch.
    assert_eq!(bytes.len(), one.len() + two.len());
    assert_eq!(&bytes[17..one.len()], &one[17..]);
    assert_eq!(&bytes[one.len() + 17..], &two[17..]);
    // A position inside the first batch gives the whole batch, of which the reader leaves out the front.
    let middle = Position::unchecked(1);
    let (values, next, offsets) =
        fetch(&broker, tp, middle, Isolation::ReadCommitted, Duration::ZERO).await.unwrap();
    assert_eq!((values, next.offset), (vec!["b".to_owned(), "c".to_owned()], 3));
    assert_eq!((offsets.log_start, offsets.high_watermark, offsets.last_stable), (0, 3, 3));
}

async fn a_batch_sent_twice_is_there_once(host: &impl Host) {
    let broker = host.connect().await;
    let tp = topic(&broker, "t", 1).await.partition(0);
    let who = plain(&broker).await;
    for n in 0..5 {
        let batch = batch(who, n, false, &["x"]);
        assert_eq!(send(&broker, who, tp, batch.clone()).await, Ok((n.into(), false)));
        assert_eq!(send(&broker, who, tp, batch).await, Ok((n.into(), true)));
    }
    // All of the last five are known, whatever came after.
    assert_eq!(send(&broker, who, tp, batch(who, 0, false, &["x"])).await, Ok((0, true)));
    assert_eq!(read_all(&broker, tp, Isolation::ReadCommitted).await.len(), 5);
}

async fn sequences_out_of_order_move_nothing(host: &impl Host) {
    let broker = host.connect().await;
    let tp = topic(&broker, "t", 1).await.partition(0);
    let who = plain(&broker).await;
    let gap = send(&broker, who, tp, batch(who, 1, false, &["x"])).await;
    assert!(matches!(gap, Err(BrokerError::OutOfOrder { expected: 0, found: 1, .. })), "{gap:?}");
    for n in 0..6 {
        assert_eq!(send(&broker, who, tp, batch(who, n, false, &["x"])).await, Ok((n.into(), false)));
    }
    let ahead = send(&broker, who, tp, batch(who, 7, false, &["x"])).await;
    assert!(matches!(ahead, Err(BrokerError::OutOfOrder { expected: 6, found: 7, .. })), "{ahead:?}");
    // The sixth last is forgotten: it must not be appended again.
    let forgotten = send(&broker, who, tp, batch(who, 0, false, &["x"])).await;
    assert!(matches!(forgotten, Err(BrokerError::OutOfOrder { .. })), "{forgotten:?}");
    assert_eq!(send(&broker, who, tp, batch(who, 6, false, &["x"])).await, Ok((6, false)));
    assert_eq!(read_all(&broker, tp, Isolation::ReadCommitted).await.len(), 7);
    let stranger = ProducerIdentity { id: 4_000_000, epoch: 0 };
    let unknown = send(&broker, stranger, tp, batch(stranger, 0, false, &["x"])).await;
    assert!(matches!(unknown, Err(BrokerError::UnknownProducer { .. })), "{unknown:?}");
}

async fn one_refused_partition_does_not_refuse_the_others(host: &impl Host) {
    let broker = host.connect().await;
    let topic = topic(&broker, "t", 2).await;
    let who = plain(&broker).await;
    let good = batch(who, 0, false, &["x"]);
    let mut damaged = good.to_vec();
    *damaged.last_mut().unwrap() ^= 1;
    let parts = [
        (topic.partition(7), good.clone()),
        (topic.partition(0), good.clone()),
        (topic.partition(1), Bytes::from(damaged)),
        (topic.partition(1), good),
    ];
    let entry = |(partition, bytes): &(TopicPartition, Bytes)| ProducePartition {
        partition: *partition,
        bytes: u32::try_from(bytes.len()).unwrap(),
    };
    let request = Produce { producer: who, batches: parts.iter().map(entry).collect() };
    let all: Attachment = parts.iter().map(|(_, bytes)| bytes.clone()).collect();
    let outcomes = within(broker.produce(request.clone(), all)).await.unwrap().outcomes;
    let refused = |n: usize| match &outcomes[n] {
        ProduceOutcome::Refused(error) => error.clone().into_error(),
        other => panic!("{other:?}"),
    };
    assert!(matches!(refused(0), BrokerError::UnknownPartition { partition: 7, .. }), "{:?}", refused(0));
    assert!(matches!(outcomes[1], ProduceOutcome::Appended { base_offset: 0, .. }));
    assert!(matches!(refused(2), BrokerError::Invalid { .. }), "{:?}", refused(2));
    assert!(matches!(outcomes[3], ProduceOutcome::Appended { base_offset: 0, duplicate: false, .. }));
    let short = within(broker.produce(request, Attachment::new(vec![0; 10]))).await;
    assert!(matches!(short, Err(BrokerError::Invalid { .. })), "{short:?}");
}

async fn a_waiting_fetch_is_woken_by_an_append(host: &impl Host) {
    let broker = host.connect().await;
    let tp = topic(&broker, "t", 1).await.partition(0);
    let who = plain(&broker).await;
    let reader = host.connect().await;
    let waiting = tokio::spawn(async move {
        fetch(&reader, tp, Position::START, Isolation::ReadCommitted, Duration::from_secs(15)).await
    });
    let begun = std::time::Instant::now();
    send(&broker, who, tp, batch(who, 0, false, &["x"])).await.unwrap();
    let (values, ..) = within(waiting).await.unwrap().unwrap();
    assert_eq!(values, ["x"]);
    assert!(begun.elapsed() < Duration::from_secs(10), "woken, not timed out");
}

async fn a_waiting_fetch_ends_at_its_deadline(host: &impl Host) {
    let broker = host.connect().await;
    let tp = topic(&broker, "t", 1).await.partition(0);
    let begun = std::time::Instant::now();
    let wait = Duration::from_millis(80);
    let (values, next, _) =
        fetch(&broker, tp, Position::START, Isolation::ReadCommitted, wait).await.unwrap();
    assert!(values.is_empty() && next == Position::START);
    assert!(begun.elapsed() >= wait);
}

async fn a_commit_shows_everything_at_once(host: &impl Host) {
    let broker = host.connect().await;
    let topic = topic(&broker, "t", 2).await;
    let (p0, p1) = (topic.partition(0), topic.partition(1));
    let who = transactional(&broker, "job").await;
    send(&broker, who, p0, batch(who, 0, true, &["a"])).await.unwrap();
    send(&broker, who, p1, batch(who, 0, true, &["b"])).await.unwrap();
    let other = plain(&broker).await;
    send(&broker, other, p0, batch(other, 0, false, &["after"])).await.unwrap();
    // The last stable offset stops at the open transaction; a careless reader sees beyond it.
    let (values, _, offsets) =
        fetch(&broker, p0, Position::START, Isolation::ReadCommitted, Duration::ZERO).await.unwrap();
    assert!(values.is_empty());
    assert_eq!((offsets.last_stable, offsets.high_watermark), (0, 2));
    assert_eq!(read_all(&broker, p0, Isolation::ReadUncommitted).await, ["a", "after"]);
    let reader = host.connect().await;
    let waiting = tokio::spawn(async move {
        fetch(&reader, p1, Position::START, Isolation::ReadCommitted, Duration::from_secs(15)).await
    });
    let ended = end(&broker, "job", who, End::Commit).await.unwrap();
    assert_eq!(ended.outcome, Outcome::Committed);
    assert_ne!(ended.next, who, "each transaction has its own identity");
    assert_eq!(within(waiting).await.unwrap().unwrap().0, ["b"], "an end wakes a waiting reader");
    assert_eq!(read_all(&broker, p0, Isolation::ReadCommitted).await, ["a", "after"]);
    assert_eq!(read_all(&broker, p1, Isolation::ReadCommitted).await, ["b"]);
}

async fn an_abort_shows_nothing(host: &impl Host) {
    let broker = host.connect().await;
    let tp = topic(&broker, "t", 1).await.partition(0);
    let who = transactional(&broker, "job").await;
    send(&broker, who, tp, batch(who, 0, true, &["gone"])).await.unwrap();
    let ended = end(&broker, "job", who, End::Abort).await.unwrap();
    assert_eq!(ended.outcome, Outcome::Aborted);
    let who = ended.next;
    send(&broker, who, tp, batch(who, 0, true, &["stays"])).await.unwrap();
    end(&broker, "job", who, End::Commit).await.unwrap();
    assert_eq!(read_all(&broker, tp, Isolation::ReadCommitted).await, ["stays"]);
    assert_eq!(read_all(&broker, tp, Isolation::ReadUncommitted).await, ["gone", "stays"]);
}

async fn an_init_fences_and_aborts(host: &impl Host) {
    let (old, new) = (host.connect().await, host.connect().await);
    let tp = topic(&old, "t", 1).await.partition(0);
    let first = transactional(&old, "job").await;
    send(&old, first, tp, batch(first, 0, true, &["zombie"])).await.unwrap();
    let second = transactional(&new, "job").await;
    assert_ne!(first, second);
    let late = send(&old, first, tp, batch(first, 1, true, &["zombie"])).await;
    assert!(matches!(late, Err(BrokerError::Fenced { .. })), "{late:?}");
    let late = end(&old, "job", first, End::Commit).await;
    assert!(
        !matches!(late, Ok(Ended { outcome: Outcome::Committed, .. })),
        "a zombie must not be told that it committed: {late:?}"
    );
    send(&new, second, tp, batch(second, 0, true, &["new"])).await.unwrap();
    end(&new, "job", second, End::Commit).await.unwrap();
    assert_eq!(read_all(&new, tp, Isolation::ReadCommitted).await, ["new"]);
}

async fn a_retried_end_is_told_the_same(host: &impl Host) {
    let broker = host.connect().await;
    let tp = topic(&broker, "t", 1).await.partition(0);
    let first = transactional(&broker, "job").await;
    send(&broker, first, tp, batch(first, 0, true, &["a"])).await.unwrap();
    let committed = end(&broker, "job", first, End::Commit).await.unwrap();
    // On another connection, asking for the opposite, after the next transaction has begun.
    let other = host.connect().await;
    assert_eq!(end(&other, "job", first, End::Abort).await.unwrap(), committed);
    let second = committed.next;
    send(&broker, second, tp, batch(second, 0, true, &["b"])).await.unwrap();
    assert_eq!(end(&other, "job", first, End::Commit).await.unwrap(), committed);
    let aborted = end(&broker, "job", second, End::Abort).await.unwrap();
    assert_eq!(end(&other, "job", second, End::Commit).await.unwrap(), aborted);
    let forgotten = end(&broker, "job", first, End::Commit).await;
    assert!(matches!(forgotten, Err(BrokerError::Fenced { .. })), "{forgotten:?}");
    // An end with nothing open bumps all the same.
    let empty = end(&broker, "job", aborted.next, End::Commit).await.unwrap();
    assert_eq!(empty.outcome, Outcome::Committed);
    assert_ne!(empty.next, aborted.next);
    assert_eq!(read_all(&broker, tp, Isolation::ReadCommitted).await, ["a"]);
}

async fn a_late_request_of_an_ended_transaction_is_fenced(host: &impl Host) {
    let broker = host.connect().await;
    let topic = topic(&broker, "t", 2).await;
    let who = transactional(&broker, "job").await;
    send(&broker, who, topic.partition(0), batch(who, 0, true, &["a"])).await.unwrap();
    let next = end(&broker, "job", who, End::Commit).await.unwrap().next;
    let late = send(&broker, who, topic.partition(1), batch(who, 0, true, &["late"])).await;
    assert!(
        matches!(late, Err(BrokerError::Fenced { .. } | BrokerError::UnknownProducer { .. })),
        "{late:?}"
    );
    let request = CommitOffsets {
        group: "g".into(),
        transaction: Some(TransactionalIdentity { transactional_id: "job".into(), producer: who }),
        offsets: vec![],
    };
    let late = within(broker.commit_offsets(request)).await;
    assert!(
        matches!(late, Err(BrokerError::Fenced { .. } | BrokerError::UnknownProducer { .. })),
        "{late:?}"
    );
    end(&broker, "job", next, End::Commit).await.unwrap();
    assert_eq!(read_all(&broker, topic.partition(1), Isolation::ReadUncommitted).await, [""; 0]);
}

async fn a_retried_init_is_answered_alike_and_a_stale_one_is_fenced(host: &impl Host) {
    let broker = host.connect().await;
    let first = plain(&broker).await;
    let carry = |carried| InitProducer { transactional_id: None, timeout_ms: 0, carried: Some(carried) };
    let second = within(broker.init_producer(carry(first))).await.unwrap();
    assert_ne!(first, second);
    assert_eq!(within(broker.init_producer(carry(first))).await, Ok(second), "a retry");
    let third = within(broker.init_producer(carry(second))).await.unwrap();
    let stale = within(broker.init_producer(carry(first))).await;
    assert!(matches!(stale, Err(BrokerError::Fenced { .. })), "{stale:?}");
    assert_eq!(within(broker.init_producer(carry(second))).await, Ok(third));
}

async fn a_transaction_that_takes_too_long_is_aborted(host: &impl Host) {
    let broker = host.connect().await;
    let tp = topic(&broker, "t", 1).await.partition(0);
    let init = InitProducer { transactional_id: Some("slow".into()), timeout_ms: 100, carried: None };
    let who = within(broker.init_producer(init)).await.unwrap();
    send(&broker, who, tp, batch(who, 0, true, &["a"])).await.unwrap();
    // The abort moves the last stable offset, and that wakes this fetch.
    let wait = Duration::from_secs(15);
    let (values, next, _) =
        fetch(&broker, tp, Position::START, Isolation::ReadCommitted, wait).await.unwrap();
    assert!(values.is_empty() && next.offset == 2, "{values:?} {next:?}");
    let told = end(&broker, "slow", who, End::Commit).await.unwrap();
    assert_eq!(told.outcome, Outcome::Aborted);
    assert_ne!(told.next, who, "an abort that nobody asked for bumps");
}

fn offset(partition: TopicPartition, position: Position, metadata: &'static str) -> GroupOffset {
    GroupOffset { partition, position, metadata: metadata.into() }
}

async fn committed(broker: &AnyBroker, stable: Stable) -> Result<Vec<GroupOffset>, BrokerError> {
    let request = FetchOffsets { group: "g".into(), stable };
    within(broker.fetch_offsets(request)).await.map(|found| found.offsets)
}

async fn offsets_are_pending_until_the_end(host: &impl Host) {
    let broker = host.connect().await;
    let tp = topic(&broker, "in", 1).await.partition(0);
    let source = plain(&broker).await;
    send(&broker, source, tp, batch(source, 0, false, &["a", "b"])).await.unwrap();
    let (_, position, _) =
        fetch(&broker, tp, Position::START, Isolation::ReadCommitted, Duration::ZERO).await.unwrap();
    let who = transactional(&broker, "job").await;
    let add = |who, offsets| CommitOffsets {
        group: "g".into(),
        transaction: Some(TransactionalIdentity { transactional_id: "job".into(), producer: who }),
        offsets,
    };
    // Offsets alone open a transaction.
    within(broker.commit_offsets(add(who, vec![offset(tp, position, "one")]))).await.unwrap();
    assert_eq!(committed(&broker, Stable::Released).await, Ok(vec![]));
    let pending = committed(&broker, Stable::Wait(30)).await;
    assert_eq!(pending, Err(BrokerError::OffsetsPending { group: "g".into() }));
    let reader = host.connect().await;
    let waiting = tokio::spawn(async move { committed(&reader, Stable::Wait(15_000)).await });
    let next = end(&broker, "job", who, End::Commit).await.unwrap().next;
    let one = vec![offset(tp, position, "one")];
    assert_eq!(within(waiting).await.unwrap(), Ok(one.clone()));
    within(broker.commit_offsets(add(next, vec![offset(tp, Position::START, "two")]))).await.unwrap();
    end(&broker, "job", next, End::Abort).await.unwrap();
    assert_eq!(committed(&broker, Stable::Wait(15_000)).await, Ok(one), "an abort drops them");
}

async fn offsets_outside_a_transaction_are_committed_at_once(host: &impl Host) {
    let broker = host.connect().await;
    let topic = topic(&broker, "in", 2).await;
    let start = Position::START;
    let both = vec![offset(topic.partition(0), start, "x"), offset(topic.partition(1), start, "")];
    let commit = CommitOffsets { group: "g".into(), transaction: None, offsets: both.clone() };
    within(broker.commit_offsets(commit)).await.unwrap();
    assert_eq!(committed(&broker, Stable::Released).await, Ok(both));
}

async fn positions_that_do_not_hold_are_refused(host: &impl Host) {
    let broker = host.connect().await;
    let tp = topic(&broker, "t", 1).await.partition(0);
    let who = plain(&broker).await;
    send(&broker, who, tp, batch(who, 0, false, &["a"])).await.unwrap();
    let (_, end, _) =
        fetch(&broker, tp, Position::START, Isolation::ReadCommitted, Duration::ZERO).await.unwrap();
    let wrong = Position { leader_epoch: end.leader_epoch + 7, offset: 1 };
    let refused = fetch(&broker, tp, wrong, Isolation::ReadCommitted, Duration::ZERO).await;
    assert!(matches!(refused, Err(BrokerError::PositionDoesNotHold { .. })), "{refused:?}");
    let beyond = fetch(&broker, tp, Position::unchecked(5), Isolation::ReadCommitted, Duration::ZERO).await;
    assert!(matches!(beyond, Err(BrokerError::OutOfRange { offset: 5, .. })), "{beyond:?}");
    let commit = |position| CommitOffsets {
        group: "g".into(),
        transaction: None,
        offsets: vec![offset(tp, position, "")],
    };
    let refused = within(broker.commit_offsets(commit(wrong))).await;
    assert!(matches!(refused, Err(BrokerError::PositionDoesNotHold { .. })), "{refused:?}");
    within(broker.commit_offsets(commit(end))).await.unwrap();
    let list = |at| ListOffsets { partitions: vec![tp], at };
    for at in [At::Latest, At::Stable] {
        let listed = within(broker.list_offsets(list(at))).await.unwrap();
        assert_eq!(listed.offsets, [ListedOffset::Found(end)]);
    }
    let listed = within(broker.list_offsets(list(At::Earliest))).await.unwrap();
    assert_eq!(listed.offsets, [ListedOffset::Found(Position::START)]);
}

async fn requests_count_on_the_newest_connection_only(host: &impl Host) {
    let (old, new) = (host.connect().await, host.connect().await);
    let tp = topic(&old, "t", 1).await.partition(0);
    let who = plain(&old).await;
    send(&old, who, tp, batch(who, 0, false, &["a"])).await.unwrap();
    assert_eq!(send(&new, who, tp, batch(who, 0, false, &["a"])).await, Ok((0, true)));
    let late = send(&old, who, tp, batch(who, 1, false, &["late"])).await;
    assert!(matches!(late, Err(BrokerError::OldConnection { .. })), "{late:?}");
    assert_eq!(send(&new, who, tp, batch(who, 1, false, &["b"])).await, Ok((1, false)));
    assert_eq!(read_all(&new, tp, Isolation::ReadCommitted).await, ["a", "b"]);
}

async fn clients_carry_records_from_end_to_end(host: &impl Host) {
    use tidemill_log::batch::{Compression, RecordParts};
    let broker = host.connect().await;
    let topic = topic(&broker, "t", 3).await;
    let options = ProducerOptions {
        compression: Compression::Lz4,
        batch_bytes_max: 2 << 10,
        memory_bytes_max: 64 << 10,
        ..ProducerOptions::default()
    };
    let producer = Producer::open(broker.clone(), options).await.unwrap();
    let mut acks = Vec::new();
    for n in 0..5000 {
        let (key, value) = (format!("key-{}", n % 17), format!("{n}"));
        let record = RecordParts {
            timestamp: n,
            key: (n % 3 != 0).then_some(key.as_bytes()),
            value: Some(value.as_bytes()),
            headers: &[("h", Some(b"v"))],
        };
        let partition = (n % 5 == 0).then_some(2);
        acks.push(within(producer.send(&topic, partition, record)).await.unwrap());
    }
    within(producer.flush()).await.unwrap();
    assert_eq!(producer.durable_prefix(), DurablePrefix { durable: 5000, in_doubt: 0 });
    assert!(within(acks[4999].offset()).await.unwrap() >= 0);

    let positions = (0..3).map(|p| (topic.partition(p), Position::START)).collect();
    let options = ConsumerOptions { fetch_bytes_max: 16 << 10, ..ConsumerOptions::default() };
    let mut consumer = Consumer::start(host.connect().await, positions, options);
    let mut seen: Vec<(u32, i64)> = Vec::new();
    loop {
        match within(consumer.next()).await.unwrap().unwrap() {
            Event::CaughtUp => break,
            Event::Failed { error, .. } => panic!("{error}"),
            Event::Batches(consumed) => for_each_record(&consumed.batches, consumed.from, |record| {
                let value = std::str::from_utf8(record.value.unwrap()).unwrap();
                assert_eq!(value, record.timestamp.to_string());
                assert_eq!(record.headers.len(), 1);
                seen.push((consumed.partition.partition, record.timestamp));
            })
            .unwrap(),
        }
    }
    // In every partition what went there is in the order of sending.
    for partition in 0..3 {
        let order: Vec<i64> = seen.iter().filter(|(p, _)| *p == partition).map(|(_, n)| *n).collect();
        assert!(order.is_sorted() && !order.is_empty());
        if partition != 2 {
            assert!(order.iter().all(|n| n % 5 != 0), "an explicit partition is kept");
        }
    }
    let mut all: Vec<i64> = seen.into_iter().map(|(_, n)| n).collect();
    all.sort_unstable();
    assert_eq!(all, (0..5000).collect::<Vec<_>>());
    // The consumer goes on where it waits.
    let record = RecordParts { timestamp: 5000, value: Some(b"5000"), ..RecordParts::default() };
    let _ack = within(producer.send(&topic, None, record)).await.unwrap();
    assert_eq!(within(producer.close()).await.unwrap().durable, 5001);
    assert!(matches!(within(consumer.next()).await.unwrap().unwrap(), Event::Batches(_)));
}

async fn a_transactional_client_commits_and_aborts(host: &impl Host) {
    use tidemill_log::batch::RecordParts;
    let broker = host.connect().await;
    let topic = topic(&broker, "t", 2).await;
    let record =
        |value: &'static str| RecordParts { value: Some(value.as_bytes()), ..RecordParts::default() };
    let open = || TransactionalProducer::open(broker.clone(), "job", TransactionalOptions::default());
    let mut first = within(open()).await.unwrap();
    for (value, commit) in [("a", true), ("b", false), ("c", true)] {
        for partition in 0..2 {
            let _ack = within(first.send(&topic, Some(partition), record(value))).await.unwrap();
        }
        let position = Position::START;
        within(first.add_offsets("g", vec![offset(topic.partition(0), position, value)])).await.unwrap();
        let outcome = within(async { if commit { first.commit().await } else { first.abort().await } }).await;
        assert_eq!(outcome, Ok(if commit { Outcome::Committed } else { Outcome::Aborted }));
    }
    for partition in 0..2 {
        let values = read_all(&broker, topic.partition(partition), Isolation::ReadCommitted).await;
        assert_eq!(values, ["a", "c"]);
    }
    assert_eq!(committed(&broker, Stable::Wait(15_000)).await.unwrap()[0].metadata, Bytes::from("c"));
    // Another instance takes over in the middle of a transaction.
    let _ack = within(first.send(&topic, Some(0), record("zombie"))).await.unwrap();
    within(first.flush()).await.unwrap();
    let mut second = within(open()).await.unwrap();
    let zombie = within(first.commit()).await;
    assert!(!matches!(zombie, Ok(Outcome::Committed)), "{zombie:?}");
    let _ack = within(second.send(&topic, Some(0), record("d"))).await.unwrap();
    assert_eq!(within(second.commit()).await, Ok(Outcome::Committed));
    let values = read_all(&broker, topic.partition(0), Isolation::ReadCommitted).await;
    assert_eq!(values, ["a", "c", "d"]);
}
