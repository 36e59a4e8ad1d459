//! Encodings of the files beside a segment: `.headcrc`, `.index`, `.txnindex`.
//!
//! ```text
//!   .headcrc    16 bytes per batch, at ordinal * 16
//!                 0 position of the batch u64 · 8 value u32 · 12 own crc u32
//!               value = crc32c of the file's seed and the batch's first 21 bytes, which hold the batch's own crc
//!   .index      16 bytes per 4 KiB block of the segment, at block * 16; zeros where no batch begins in the block
//!                 0 offset - base offset u32 · 4 ordinal u32 · 8 position - block start u32 · 12 own crc u32
//!   .txnindex   32 bytes per aborted transaction whose marker is in the segment, in order of their markers
//!                 0 producer id i64 · 8 first offset i64 · 16 offset of the marker i64 · 24 zero u32 · 28 own crc u32
//! ```
//!
//! All big-endian. Every cell's own crc starts from the file's [`FileSeed`] (topic, partition, base offset, revision),
//! the kind of file, and the cell's place in it; so neither a stale cell, nor one of another file, nor one out of
//! place is taken for good.
//!
//! Invariants:
//!
//! * a cell's place and bytes follow from its batch and the batch before it alone, so writing a sidecar again from the
//!   journal or from the segment gives the same file;
//! * no cell crosses a page, so that a torn write leaves whole cells or none;
//! * a damaged `.headcrc` or `.index` cell is absent, never wrong: it can be rebuilt. A good `.headcrc` cell that
//!   differs from the batch is damage of the segment.
//!
//! The batch's crc leaves its first 21 bytes uncovered; without `.headcrc` a flipped base offset or a batch of another
//! segment would be served as it is.

use uuid::Uuid;

use crate::batch::UNCOVERED_BYTES;
use crate::types::AbortedRange;

/// Bytes of a `.headcrc` cell.
pub const HEADCRC_CELL_BYTES: usize = 16;
/// Bytes of an `.index` cell.
pub const INDEX_CELL_BYTES: usize = 16;
/// Bytes of a `.txnindex` cell.
pub const TXN_CELL_BYTES: usize = 32;
/// Bytes of a segment that one `.index` cell stands for.
pub const INDEX_BLOCK_BYTES: u64 = 4096;

/// What ties a sidecar to its segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileSeed(u32);

/// Keeps a cell of one kind of file from being good in another.
#[derive(Clone, Copy)]
enum Kind {
    HeadCrc = 1,
    Index,
    Txn,
}

/// What a `.headcrc` cell says about a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HeadCheck {
    /// The cell is good and the batch is the one it was written for.
    Good,
    /// The cell is missing or damaged: it says nothing, and can be rebuilt from a batch whose own crc is good.
    NoCell,
    /// The cell is good, the batch is not the one it was written for.
    Differs {
        /// Where the cell says its batch is.
        position: u64,
        /// The cell's value.
        expected: u32,
        /// The batch's.
        found: u32,
    },
}

/// A batch to start reading from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct IndexEntry {
    /// Its base offset, relative to the segment's.
    pub relative_offset: u64,
    /// Where it begins in the segment.
    pub position: u64,
    /// How many batches are before it in the segment.
    pub ordinal: u32,
}

impl FileSeed {
    /// The seed of the sidecars of one segment file.
    pub fn new(topic: Uuid, partition: u32, base_offset: i64, revision: u32) -> Self {
        let seed = crc32c::crc32c(topic.as_bytes());
        let seed = crc32c::crc32c_append(seed, &partition.to_be_bytes());
        let seed = crc32c::crc32c_append(seed, &base_offset.to_be_bytes());
        Self(crc32c::crc32c_append(seed, &revision.to_be_bytes()))
    }

    fn own_crc(self, kind: Kind, place: u64, cell: &[u8]) -> u32 {
        let crc = crc32c::crc32c_append(self.0, &[kind as u8]);
        crc32c::crc32c_append(crc32c::crc32c_append(crc, &place.to_be_bytes()), cell)
    }

    fn sealed<const N: usize>(self, kind: Kind, place: u64, mut cell: [u8; N]) -> [u8; N] {
        let crc = self.own_crc(kind, place, &cell[..N - 4]);
        cell[N - 4..].copy_from_slice(&crc.to_be_bytes());
        cell
    }

    /// The cell at `place`, if it is there and good.
    fn cell<const N: usize>(self, kind: Kind, place: u64, file: &[u8]) -> Option<[u8; N]> {
        let at = usize::try_from(place).ok()?.checked_mul(N)?;
        let cell: [u8; N] = *file.get(at..)?.first_chunk::<N>()?;
        let crc = u32::from_be_bytes(*cell.last_chunk()?);
        (crc == self.own_crc(kind, place, &cell[..N - 4])).then_some(cell)
    }

    /// The value that `.headcrc` keeps for a batch.
    ///
    /// # Panics
    ///
    /// If `batch` is shorter than the 21 bytes.
    fn head_value(self, batch: &[u8]) -> u32 {
        crc32c::crc32c_append(self.0, &batch[..UNCOVERED_BYTES])
    }

    /// The `.headcrc` cell of a batch, which goes to `ordinal * HEADCRC_CELL_BYTES`. Its base offset and leader epoch
    /// are set by now.
    ///
    /// # Panics
    ///
    /// If `batch` is shorter than a batch's header.
    pub fn headcrc_cell(self, ordinal: u32, position: u64, batch: &[u8]) -> [u8; HEADCRC_CELL_BYTES] {
        let mut cell = [0; HEADCRC_CELL_BYTES];
        cell[..8].copy_from_slice(&position.to_be_bytes());
        cell[8..12].copy_from_slice(&self.head_value(batch).to_be_bytes());
        self.sealed(Kind::HeadCrc, ordinal.into(), cell)
    }

    /// Holds a batch found at `position` against the `.headcrc` file's cell `ordinal`.
    pub fn check_head(self, headcrc: &[u8], ordinal: u32, position: u64, batch: &[u8]) -> HeadCheck {
        let cells = usize::try_from(ordinal).ok().and_then(|n| n.checked_mul(HEADCRC_CELL_BYTES));
        match cells.and_then(|at| headcrc.get(at..)) {
            Some(cell) => self.check_head_cell(cell, ordinal, position, batch),
            None => HeadCheck::NoCell,
        }
    }

    /// [`check_head`](Self::check_head) with the bytes of that cell alone, as read from its place.
    pub fn check_head_cell(self, cell: &[u8], ordinal: u32, position: u64, batch: &[u8]) -> HeadCheck {
        let Some((cell, own)) =
            cell.first_chunk::<HEADCRC_CELL_BYTES>().and_then(|cell| cell.split_last_chunk::<4>())
        else {
            return HeadCheck::NoCell;
        };
        if u32::from_be_bytes(*own) != self.own_crc(Kind::HeadCrc, ordinal.into(), cell) {
            return HeadCheck::NoCell;
        }
        let (at, expected) = (u64::from_be_bytes(chunk(cell, 0)), u32::from_be_bytes(chunk(cell, 8)));
        let found = match batch.len() {
            UNCOVERED_BYTES.. => self.head_value(batch),
            _ => !expected, // no batch at all
        };
        if at == position && found == expected {
            return HeadCheck::Good;
        }
        HeadCheck::Differs { position: at, expected, found }
    }

    /// The `.index` cell of a batch and its place in the file, if the batch has one: it is the first to begin in its
    /// 4 KiB block. `previous` is where the batch before it begins.
    pub fn index_cell(
        self,
        previous: Option<u64>,
        entry: IndexEntry,
    ) -> Option<(u64, [u8; INDEX_CELL_BYTES])> {
        let block = entry.position / INDEX_BLOCK_BYTES;
        if previous.is_some_and(|previous| previous / INDEX_BLOCK_BYTES == block) {
            return None;
        }
        // Offsets this far from the base have no cell; a reader starts from an earlier one.
        let relative = u32::try_from(entry.relative_offset).ok()?;
        let within = (entry.position % INDEX_BLOCK_BYTES) as u32; // below 4096
        let mut cell = [0; INDEX_CELL_BYTES];
        cell[..4].copy_from_slice(&relative.to_be_bytes());
        cell[4..8].copy_from_slice(&entry.ordinal.to_be_bytes());
        cell[8..12].copy_from_slice(&within.to_be_bytes());
        Some((block * INDEX_CELL_BYTES as u64, self.sealed(Kind::Index, block, cell)))
    }

    /// The last batch in the `.index` file that begins at or before the offset; the segment's first one where the file
    /// has none. Damaged cells cost time, not truth.
    pub fn index_lookup(self, index: &[u8], relative_offset: u64) -> IndexEntry {
        let mut best = IndexEntry::default();
        let (mut low, mut high) = (0, (index.len() / INDEX_CELL_BYTES) as u64);
        // Good cells ascend by offset; a block without one is decided by the nearest good one below it.
        while low < high {
            let middle = low + (high - low) / 2;
            match (low..=middle).rev().find_map(|block| Some((block, self.index_entry(index, block)?))) {
                Some((_, entry)) if entry.relative_offset <= relative_offset => {
                    best = entry;
                    low = middle + 1;
                }
                Some((block, _)) => high = block,
                None => low = middle + 1,
            }
        }
        best
    }

    fn index_entry(self, index: &[u8], block: u64) -> Option<IndexEntry> {
        let cell = self.cell::<INDEX_CELL_BYTES>(Kind::Index, block, index)?;
        Some(IndexEntry {
            relative_offset: u32::from_be_bytes(chunk(&cell, 0)).into(),
            ordinal: u32::from_be_bytes(chunk(&cell, 4)),
            position: block * INDEX_BLOCK_BYTES + u64::from(u32::from_be_bytes(chunk(&cell, 8))),
        })
    }

    /// A closed segment's `.txnindex` file.
    pub fn txn_index(self, ranges: &[AbortedRange]) -> Vec<u8> {
        let cells = ranges.iter().zip(0..).flat_map(|(range, place)| {
            let mut cell = [0; TXN_CELL_BYTES];
            cell[..8].copy_from_slice(&range.producer_id.to_be_bytes());
            cell[8..16].copy_from_slice(&range.first.to_be_bytes());
            cell[16..24].copy_from_slice(&range.last.to_be_bytes());
            self.sealed(Kind::Txn, place, cell)
        });
        cells.collect()
    }

    /// The first `count` ranges of a `.txnindex` file, or the place of the first cell that is missing or damaged. The
    /// count is State's: unlike the other sidecars this file may not be short.
    pub fn aborted_ranges(self, file: &[u8], count: u32) -> Result<Vec<AbortedRange>, u32> {
        let ranges = (0..count).map(|place| {
            let cell = self.cell::<TXN_CELL_BYTES>(Kind::Txn, place.into(), file).ok_or(place)?;
            Ok(AbortedRange {
                producer_id: i64::from_be_bytes(chunk(&cell, 0)),
                first: i64::from_be_bytes(chunk(&cell, 8)),
                last: i64::from_be_bytes(chunk(&cell, 16)),
            })
        });
        ranges.collect()
    }
}

/// The `N` bytes at `at`, which the caller knows are there.
fn chunk<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(&bytes[at..at + N]);
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn seed() -> FileSeed {
        FileSeed::new(Uuid::from_u128(7), 3, 1000, 0)
    }

    #[test]
    fn a_head_is_held_against_its_own_cell_only() {
        let batch: Vec<u8> = (0..61).collect();
        let file: Vec<u8> = (0..4).flat_map(|i| seed().headcrc_cell(i, u64::from(i) * 61, &batch)).collect();
        assert_eq!(seed().check_head(&file, 2, 122, &batch), HeadCheck::Good);
        assert_eq!(seed().check_head(&file, 4, 244, &batch), HeadCheck::NoCell);
        assert!(matches!(seed().check_head(&file, 2, 121, &batch), HeadCheck::Differs { position: 122, .. }));
        assert!(matches!(seed().check_head(&file, 2, 122, &batch[..5]), HeadCheck::Differs { .. }));
        // Each of the bits that the batch's own crc leaves out.
        for bit in 0..UNCOVERED_BYTES * 8 {
            let mut flipped = batch.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(
                matches!(seed().check_head(&file, 2, 122, &flipped), HeadCheck::Differs { .. }),
                "bit {bit}"
            );
        }
        // A damaged cell says nothing, and neither does a good one of another place or file.
        for bit in 0..HEADCRC_CELL_BYTES * 8 {
            let mut flipped = file.clone();
            flipped[32 + bit / 8] ^= 1 << (bit % 8);
            assert_eq!(seed().check_head(&flipped, 2, 122, &batch), HeadCheck::NoCell, "bit {bit}");
        }
        assert_eq!(seed().check_head(&file[16..], 2, 122, &batch), HeadCheck::NoCell);
        for other in [
            FileSeed::new(Uuid::from_u128(8), 3, 1000, 0),
            FileSeed::new(Uuid::from_u128(7), 2, 1000, 0),
            FileSeed::new(Uuid::from_u128(7), 3, 1001, 0),
            FileSeed::new(Uuid::from_u128(7), 3, 1000, 1),
        ] {
            assert_eq!(other.check_head(&file, 2, 122, &batch), HeadCheck::NoCell);
        }
    }

    #[test]
    fn golden_cells() {
        let hex = |bytes: &[u8]| bytes.iter().map(|b| format!("{b:02x}")).collect::<String>();
        assert_eq!(hex(&seed().headcrc_cell(1, 61, &[9; 61])), "000000000000003d2c8ba981897373b1");
        let entry = IndexEntry { relative_offset: 5, position: 4100, ordinal: 2 };
        let (at, cell) = seed().index_cell(Some(4000), entry).unwrap();
        assert_eq!((at, hex(&cell).as_str()), (16, "000000050000000200000004f3e59297"));
        let range = AbortedRange { producer_id: 1, first: 2, last: 3 };
        assert_eq!(
            hex(&seed().txn_index(&[range])),
            "0000000000000001000000000000000200000000000000035970535c"
        );
    }

    #[test]
    fn aborted_ranges_are_all_there_or_named() {
        let ranges: Vec<_> =
            (0..9).map(|i| AbortedRange { producer_id: i, first: i * 10, last: i * 10 + 5 }).collect();
        let file = seed().txn_index(&ranges);
        assert_eq!(seed().aborted_ranges(&file, 9), Ok(ranges));
        assert_eq!(seed().aborted_ranges(&file, 10), Err(9));
        assert_eq!(seed().aborted_ranges(&file, u32::MAX), Err(9));
        let mut flipped = file.clone();
        flipped[4 * TXN_CELL_BYTES + 3] ^= 1;
        assert_eq!(seed().aborted_ranges(&flipped, 9), Err(4));
    }

    proptest! {
        /// Lookups against a linear search, with some cells damaged.
        #[test]
        fn lookups_find_the_last_batch_before(
            sizes in prop::collection::vec((61u64..20_000, 1u64..50), 1..200),
            damage in prop::collection::vec(any::<u16>(), 0..20),
        ) {
            let (mut file, mut entries) = (Vec::new(), Vec::new());
            let (mut at, mut previous) = (IndexEntry::default(), None);
            for (bytes, records) in sizes {
                if let Some((place, cell)) = seed().index_cell(previous, at) {
                    let place = place as usize;
                    file.resize(file.len().max(place + INDEX_CELL_BYTES), 0);
                    file[place..place + INDEX_CELL_BYTES].copy_from_slice(&cell);
                    entries.push(at);
                }
                previous = Some(at.position);
                at.position += bytes;
                at.relative_offset += records;
                at.ordinal += 1;
            }
            let mut damaged = std::collections::BTreeSet::new();
            for byte in damage {
                let byte = usize::from(byte) % file.len();
                if damaged.insert(byte / INDEX_CELL_BYTES) {
                    file[byte] ^= 0x10;
                }
            }
            entries.retain(|e| !damaged.contains(&((e.position / INDEX_BLOCK_BYTES) as usize)));
            for target in 0..at.relative_offset + 2 {
                let expected = entries.iter().rev().find(|e| e.relative_offset <= target);
                prop_assert_eq!(seed().index_lookup(&file, target), expected.copied().unwrap_or_default());
            }
        }
    }
}
