//! One suite that every `Fs` passes, and what only `SimFs` can show: what a crash may keep.

use std::collections::BTreeSet;
use std::io::{ErrorKind, IoSlice};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use tidemill_log::fs::sim::{Call, Crash, Failure, PAGE_BYTES, SECTOR_BYTES, SimFs};
use tidemill_log::fs::{File, Fs, OpenHow, RealFs, errno};

const EIO: i32 = 5;
const ENOSPC: i32 = 28;

fn rng(seed: u64) -> ChaCha8Rng {
    ChaCha8Rng::seed_from_u64(seed)
}

fn put(file: &dyn File, at: u64, bytes: &[u8]) {
    file.write_at(&[IoSlice::new(bytes)], at).unwrap();
}

fn all(file: &dyn File) -> Vec<u8> {
    let mut bytes = vec![0; file.len().unwrap() as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

fn read(fs: &dyn Fs, path: &str) -> Option<Vec<u8>> {
    fs.open(path, OpenHow::Read).ok().map(|file| all(&*file))
}

fn contract(fs: &dyn Fs) {
    let kind = |result: std::io::Result<()>| result.unwrap_err().kind();
    let open = |path: &str, how| fs.open(path, how).map(|_| ());

    // Names.
    assert_eq!(fs.list("").unwrap(), [""; 0]);
    fs.create_dir("topics").unwrap();
    assert_eq!(kind(fs.create_dir("topics")), ErrorKind::AlreadyExists);
    assert_eq!(kind(fs.create_dir("a/b")), ErrorKind::NotFound);
    assert_eq!(kind(open("none", OpenHow::Read)), ErrorKind::NotFound);
    assert_eq!(kind(open("none", OpenHow::Write)), ErrorKind::NotFound);
    assert_eq!(kind(open("a/b", OpenHow::CreateNew)), ErrorKind::NotFound);
    assert_eq!(kind(open("topics", OpenHow::Read)), ErrorKind::IsADirectory);
    let file = fs.open("topics/b", OpenHow::CreateNew).unwrap();
    assert_eq!(kind(open("topics/b", OpenHow::CreateNew)), ErrorKind::AlreadyExists);
    drop(fs.open("topics/a", OpenHow::CreateNew).unwrap());
    assert_eq!(fs.list("topics").unwrap(), ["a", "b"]);
    assert_eq!(fs.list("").unwrap(), ["topics"]);
    assert_eq!(fs.list("none").unwrap_err().kind(), ErrorKind::NotFound);
    assert_eq!(kind(fs.remove_dir("topics")), ErrorKind::DirectoryNotEmpty);

    // Bytes.
    assert_eq!(file.len().unwrap(), 0);
    assert!(file.is_empty().unwrap());
    let long = vec![7u8; 3 * PAGE_BYTES];
    file.write_at(&[IoSlice::new(b""), IoSlice::new(b"ab"), IoSlice::new(&long), IoSlice::new(b"cd")], 5)
        .unwrap();
    file.write_at(&[], 1 << 30).unwrap();
    assert_eq!(file.len().unwrap(), 5 + 4 + long.len() as u64);
    assert_eq!(all(&*file), [&[0; 5][..], b"ab", &long, b"cd"].concat());
    let mut buf = [0; 8];
    assert_eq!(file.read_at(&mut buf, file.len().unwrap()).unwrap(), 0);
    assert_eq!(file.read_at(&mut buf, 1 << 40).unwrap(), 0);
    assert_eq!(file.read_at(&mut buf, file.len().unwrap() - 2).unwrap(), 2);
    assert_eq!(
        file.read_exact_at(&mut buf, file.len().unwrap() - 2).unwrap_err().kind(),
        ErrorKind::UnexpectedEof
    );
    let many: Vec<[u8; 1]> = (0..3000).map(|i| [i as u8]).collect();
    let slices: Vec<IoSlice<'_>> = many.iter().map(|b| IoSlice::new(b)).collect();
    file.write_at(&slices, 0).unwrap();
    assert_eq!(all(&*file)[..3000], many.concat());

    // Sizes: what is cut comes back as zeros.
    file.set_len(3).unwrap();
    file.set_len(PAGE_BYTES as u64 + 1).unwrap();
    assert_eq!(all(&*file), [&[0, 1, 2][..], &vec![0; PAGE_BYTES - 2]].concat());
    file.reserve(0, 1 << 16).unwrap();
    file.reserve(1 << 16, 0).unwrap();
    assert_eq!(file.len().unwrap(), PAGE_BYTES as u64 + 1);
    file.zero_fill(2 * PAGE_BYTES as u64 + 7).unwrap();
    assert_eq!(all(&*file), vec![0; 2 * PAGE_BYTES + 7]);
    file.sync().unwrap();
    file.drop_cache().unwrap();
    assert_eq!(all(&*file), vec![0; 2 * PAGE_BYTES + 7]);

    // Two handles are one file; one opened for reading only reads.
    let reader = fs.open("topics/b", OpenHow::Read).unwrap();
    let writer = fs.open("topics/b", OpenHow::Write).unwrap();
    put(&*writer, 0, b"shared");
    assert_eq!(all(&*reader)[..6], *b"shared");
    let error = reader.write_at(&[IoSlice::new(b"x")], 0).unwrap_err();
    assert!(error.to_string().starts_with("write topics/b: "), "{error}");
    assert_eq!(errno(&error), Some(9), "EBADF");

    // Renames replace; an open file outlives its name.
    fs.rename("topics/b", "topics/a").unwrap();
    assert_eq!(fs.list("topics").unwrap(), ["a"]);
    assert_eq!(read(fs, "topics/a").unwrap()[..6], *b"shared");
    assert_eq!(kind(fs.rename("topics/b", "topics/c")), ErrorKind::NotFound);
    assert_eq!(kind(fs.rename("topics/a", "a")), ErrorKind::InvalidInput);
    fs.unlink("topics/a").unwrap();
    assert_eq!(kind(fs.unlink("topics/a")), ErrorKind::NotFound);
    put(&*writer, 0, b"still ");
    assert_eq!(all(&*reader)[..6], *b"still ");
    drop(fs.open("topics/a", OpenHow::CreateNew).unwrap());
    assert_eq!(read(fs, "topics/a").unwrap(), b"");
    fs.unlink("topics/a").unwrap();

    fs.sync_dir("topics").unwrap();
    fs.sync_dir("").unwrap();
    assert_eq!(kind(fs.sync_dir("none")), ErrorKind::NotFound);
    fs.remove_dir("topics").unwrap();
    assert_eq!(kind(fs.remove_dir("topics")), ErrorKind::NotFound);
    assert!(fs.free_bytes().unwrap() > 0);

    // Nothing leaves the directory.
    for path in ["/etc/passwd", "..", "../x", "a/../b", "./a", "a//b", "a/", "a\0b", &"x".repeat(256)] {
        assert_eq!(kind(open(path, OpenHow::CreateNew)), ErrorKind::InvalidInput, "{path:?}");
        assert_eq!(kind(fs.unlink(path)), ErrorKind::InvalidInput);
        assert_eq!(kind(fs.create_dir(path)), ErrorKind::InvalidInput);
        assert_eq!(kind(fs.rename("a", path)), ErrorKind::InvalidInput);
        assert_eq!(fs.list(path).unwrap_err().kind(), ErrorKind::InvalidInput);
    }
}

#[test]
fn real_files_keep_the_contract() {
    let dir = tempfile::tempdir().unwrap();
    contract(&RealFs::new(dir.path()).unwrap());
}

#[test]
fn simulated_files_keep_the_contract() {
    contract(&SimFs::new());
    let small = SimFs::new();
    small.limit_space(1 << 20);
    contract(&small);
}

#[test]
fn a_link_in_a_real_directory_is_not_followed() {
    let dir = tempfile::tempdir().unwrap();
    let outside = tempfile::NamedTempFile::new().unwrap();
    std::os::unix::fs::symlink(outside.path(), dir.path().join("link")).unwrap();
    let fs = RealFs::new(dir.path()).unwrap();
    assert!(fs.open("link", OpenHow::Write).is_err());
    assert_eq!(errno(&fs.open("none", OpenHow::Read).err().unwrap()), Some(2), "ENOENT");
    let missing = RealFs::new(dir.path().join("none")).unwrap_err();
    assert!(missing.to_string().contains("none"), "{missing}");
}

/// A file of two synced pages of `old`, its name durable.
fn two_pages(old: u8) -> (SimFs, Arc<dyn File>) {
    let fs = SimFs::new();
    let file = fs.open("f", OpenHow::CreateNew).unwrap();
    put(&*file, 0, &[old; 2 * PAGE_BYTES]);
    file.sync().unwrap();
    fs.sync_dir("").unwrap();
    (fs, file)
}

/// Every distinct thing that crashes with many seeds leave, as `look` sees it.
fn outcomes<T: Ord>(fs: &SimFs, how: Crash, look: impl Fn(&SimFs) -> T) -> BTreeSet<T> {
    (0..300).map(|seed| look(&fs.crash(how, &mut rng(seed)))).collect()
}

#[test]
fn pages_persist_one_by_one_until_the_sync() {
    let (fs, file) = two_pages(1);
    put(&*file, 0, &[2; 2 * PAGE_BYTES]);
    put(&*file, 0, &[3; PAGE_BYTES]);
    let firsts = |fs: &SimFs| {
        let bytes = fs.peek("f").unwrap();
        (bytes[0], bytes[PAGE_BYTES])
    };
    assert_eq!(outcomes(&fs, Crash::None, firsts), [(1, 1)].into());
    assert_eq!(outcomes(&fs, Crash::All, firsts), [(3, 2)].into());
    assert_eq!(outcomes(&fs, Crash::Kill, firsts), [(3, 2)].into());
    let any = [(1, 1), (1, 2), (2, 1), (2, 2), (3, 1), (3, 2)].into();
    assert_eq!(outcomes(&fs, Crash::Any, firsts), any);
    // A kill makes nothing durable.
    assert_eq!(outcomes(&fs.crash(Crash::Kill, &mut rng(0)), Crash::Any, firsts), any);
    file.sync().unwrap();
    assert_eq!(outcomes(&fs, Crash::Any, firsts), [(3, 2)].into());
}

#[test]
fn whole_pages_unless_sectors_tear() {
    let (fs, file) = two_pages(1);
    put(&*file, 0, &[2; PAGE_BYTES]);
    let kinds =
        |fs: &SimFs| fs.peek("f").unwrap()[..PAGE_BYTES].iter().copied().collect::<BTreeSet<_>>().len();
    assert_eq!(outcomes(&fs, Crash::Any, kinds), [1].into());
    fs.tear_sectors();
    assert_eq!(outcomes(&fs, Crash::Any, kinds), [1, 2].into());
    let sectors_whole = |fs: &SimFs| {
        fs.peek("f").unwrap().chunks(SECTOR_BYTES).all(|sector| sector.iter().all(|&b| b == sector[0]))
    };
    assert_eq!(outcomes(&fs, Crash::Any, sectors_whole), [true].into());
}

#[test]
fn sizes_persist_apart_from_bytes() {
    let (fs, file) = two_pages(1);
    put(&*file, 2 * PAGE_BYTES as u64, &[2; 10]);
    let seen = |fs: &SimFs| {
        let bytes = fs.peek("f").unwrap();
        (bytes.len() - 2 * PAGE_BYTES, bytes.last().copied())
    };
    // The size without the bytes reads as zeros; the bytes without the size are gone.
    assert_eq!(outcomes(&fs, Crash::Any, seen), [(0, Some(1)), (10, Some(0)), (10, Some(2))].into());
    // Bytes beyond a lost size do not come back when the file grows again.
    let after = (0..).map(|seed| fs.crash(Crash::Any, &mut rng(seed))).find(|fs| seen(fs).0 == 0).unwrap();
    after.open("f", OpenHow::Write).unwrap().set_len(2 * PAGE_BYTES as u64 + 10).unwrap();
    assert_eq!(seen(&after), (10, Some(0)));
}

#[test]
fn a_cut_is_not_durable_until_the_sync() {
    let (fs, file) = two_pages(1);
    file.set_len(0).unwrap();
    let len = |fs: &SimFs| fs.peek("f").unwrap().len();
    assert_eq!(outcomes(&fs, Crash::Any, len), [0, 2 * PAGE_BYTES].into());
    file.sync().unwrap();
    assert_eq!(outcomes(&fs, Crash::Any, len), [0].into());
}

#[test]
fn names_persist_one_by_one_until_their_directory_is_synced() {
    let fs = SimFs::new();
    fs.create_dir("d").unwrap();
    fs.sync_dir("").unwrap();
    for name in ["a", "b"] {
        let path = format!("d/{name}");
        let file = fs.open(&path, OpenHow::CreateNew).unwrap();
        put(&*file, 0, name.as_bytes());
        file.sync().unwrap();
    }
    let names = |fs: &SimFs| fs.list("d").unwrap().concat();
    fs.sync_dir("").unwrap(); // not the directory that holds them
    assert_eq!(outcomes(&fs, Crash::None, names), [""].map(String::from).into());
    assert_eq!(outcomes(&fs, Crash::Any, names), ["", "a", "b", "ab"].map(String::from).into());
    fs.sync_dir("d").unwrap();
    fs.rename("d/a", "d/b").unwrap();
    let b = |fs: &SimFs| (names(fs), read(fs, "d/b").unwrap());
    let both = [("ab".to_owned(), b"b".to_vec()), ("b".to_owned(), b"a".to_vec())];
    assert_eq!(outcomes(&fs, Crash::Any, b), both.into());
    // A file synced before its rename is whole under either name.
    fs.sync_dir("d").unwrap();
    fs.unlink("d/b").unwrap();
    assert_eq!(outcomes(&fs, Crash::Any, names), ["", "b"].map(String::from).into());
}

#[test]
fn a_lost_directory_takes_its_files_with_it() {
    let fs = SimFs::new();
    fs.create_dir("d").unwrap();
    fs.open("d/f", OpenHow::CreateNew).unwrap().sync().unwrap();
    fs.sync_dir("d").unwrap();
    let files = |fs: &SimFs| (fs.list("").unwrap().concat(), fs.files().len());
    assert_eq!(outcomes(&fs, Crash::Any, files), [(String::new(), 0), ("d".to_owned(), 1)].into());
}

#[test]
fn a_failed_sync_loses_the_pages_and_the_next_one_succeeds() {
    let (fs, file) = two_pages(1);
    put(&*file, 0, &[2; PAGE_BYTES]);
    fs.fail_op(fs.ops(), Failure::Errno(EIO));
    let error = file.sync().unwrap_err();
    assert_eq!((errno(&error), error.to_string().contains("sync f: ")), (Some(EIO), true), "{error}");
    file.sync().unwrap(); // the lie
    let first = |fs: &SimFs| fs.peek("f").unwrap()[0];
    assert_eq!(first(&fs), 2, "the page cache still has it");
    assert_eq!(outcomes(&fs, Crash::Any, first), [1, 2].into());
    // In the next life, too, until the cache is dropped.
    let next = fs.crash(Crash::Kill, &mut rng(0));
    let file = next.open("f", OpenHow::Write).unwrap();
    file.sync().unwrap();
    assert_eq!(first(&next), 2);
    file.drop_cache().unwrap();
    assert_eq!(first(&next), 1);
    // Written again and synced, it is there. Dropping the cache keeps what is still to be written.
    put(&*file, 0, &[3]);
    file.drop_cache().unwrap();
    assert_eq!(first(&next), 3);
    file.sync().unwrap();
    assert_eq!(outcomes(&next, Crash::Any, first), [3].into());
}

#[test]
fn calls_are_counted_hooked_and_failed() {
    let (fs, file) = two_pages(1);
    assert_eq!(fs.ops(), 4); // create, write, sync, sync directory
    let seen = Arc::new(AtomicU64::new(0));
    let count = seen.clone();
    fs.set_hook(move |fs, op| {
        // The hook sees the state before the call.
        assert_eq!((op.number, op.call, op.path), (4, Call::Write, "f"));
        assert_eq!(fs.crash(Crash::All, &mut rng(0)).peek("f").unwrap()[0], 1);
        count.fetch_add(1, Ordering::Relaxed);
    });
    let mut byte = [0];
    file.read_at(&mut byte, 0).unwrap();
    put(&*file, 0, &[2]);
    assert_eq!(seen.load(Ordering::Relaxed), 1);
    fs.clear_hook();
    fs.fail_op(fs.ops(), Failure::Short { bytes: 3, errno: EIO });
    assert_eq!(errno(&file.write_at(&[IoSlice::new(&[9; 8])], 0).unwrap_err()), Some(EIO));
    assert_eq!(all(&*file)[..4], [9, 9, 9, 1]);
    fs.set_fault(|op| (op.call == Call::Read).then_some(Failure::Errno(EIO)));
    assert_eq!(errno(&file.read_at(&mut byte, 0).unwrap_err()), Some(EIO));
    fs.clear_fault();
    file.read_at(&mut byte, 0).unwrap();
    // Each call can be failed, and then changes nothing.
    fs.set_fault(|op| op.call.counts().then_some(Failure::Errno(ENOSPC)));
    let before = fs.files();
    let failed = [
        fs.open("g", OpenHow::CreateNew).map(|_| ()),
        fs.create_dir("d"),
        fs.rename("f", "g"),
        fs.unlink("f"),
        fs.sync_dir(""),
        file.set_len(0),
        file.reserve(0, 1),
        file.zero_fill(1),
    ];
    for result in failed {
        assert_eq!(errno(&result.unwrap_err()), Some(ENOSPC));
    }
    assert_eq!(fs.files(), before);
}

#[test]
fn space_is_limited_and_a_reservation_holds() {
    let fs = SimFs::new();
    fs.limit_space(4 * PAGE_BYTES as u64);
    let page = PAGE_BYTES as u64;
    let a = fs.open("a", OpenHow::CreateNew).unwrap();
    let b = fs.open("b", OpenHow::CreateNew).unwrap();
    a.reserve(0, 2 * page).unwrap();
    assert_eq!(fs.free_bytes().unwrap(), 2 * page);
    assert_eq!(errno(&b.reserve(0, 3 * page).unwrap_err()), Some(ENOSPC));
    assert_eq!(fs.free_bytes().unwrap(), 2 * page, "a refused reservation takes nothing");
    let error = b.write_at(&[IoSlice::new(&[1; 3 * PAGE_BYTES])], 0).unwrap_err();
    assert_eq!(errno(&error), Some(ENOSPC));
    assert_eq!(b.len().unwrap(), 2 * page, "a short write");
    put(&*a, 0, &[1; 2 * PAGE_BYTES]);
    assert!(a.write_at(&[IoSlice::new(&[1])], 2 * page).is_err());
    b.set_len(1).unwrap();
    assert_eq!(fs.free_bytes().unwrap(), page);
    fs.unlink("a").unwrap();
    assert_eq!(fs.free_bytes().unwrap(), 3 * page);
}

#[test]
fn rot_is_on_the_medium() {
    let (fs, _file) = two_pages(1);
    fs.rot("f", 7, &[0xff]);
    assert_eq!(outcomes(&fs, Crash::None, |fs| fs.peek("f").unwrap()[7]), [0xff].into());
}
