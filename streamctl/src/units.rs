//! Numbers as people read them.

use std::fmt;

/// A number of bytes: `912 B`, `1.5 KiB`, `20 MiB`.
#[derive(Debug, Clone, Copy)]
pub struct Size(pub u64);

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut unit = 0;
        // Tenths, so that rounding up to the next unit shows as one of that unit.
        let mut tenths = u128::from(self.0) * 10;
        while tenths >= 10_235 && unit < UNITS.len() - 1 {
            tenths = tenths / 1024 + u128::from(tenths % 1024 >= 512);
            unit += 1;
        }
        let text = match (unit, tenths) {
            (0, tenths) => format!("{} B", tenths / 10),
            (_, tenths) if tenths < 100 => format!("{}.{} {}", tenths / 10, tenths % 10, UNITS[unit]),
            (_, tenths) => format!("{} {}", (tenths + 5) / 10, UNITS[unit]),
        };
        f.pad(&text)
    }
}

const UNITS: [&str; 6] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];

/// A count with its digits in groups of three: `1,234,567`.
#[derive(Debug, Clone, Copy)]
pub struct Count(pub u64);

impl fmt::Display for Count {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let digits = self.0.to_string();
        let mut text = String::with_capacity(digits.len() * 4 / 3);
        for (i, digit) in digits.chars().enumerate() {
            if i > 0 && (digits.len() - i).is_multiple_of(3) {
                text.push(',');
            }
            text.push(digit);
        }
        f.pad(&text)
    }
}

/// `1 record`, `2 records`.
pub fn plural(count: u64, one: &str, many: &str) -> String {
    format!("{} {}", Count(count), if count == 1 { one } else { many })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_counts_read_well() {
        let size = |bytes| Size(bytes).to_string();
        assert_eq!([size(0), size(1023), size(1024), size(1536)], ["0 B", "1023 B", "1.0 KiB", "1.5 KiB"]);
        assert_eq!([size(20 << 20), size((1 << 20) - 1), size(10_189)], ["20 MiB", "1.0 MiB", "10 KiB"]);
        assert_eq!(size(u64::MAX), "16384 PiB");
        assert_eq!(format!("{:>9}|", Size(1)), "      1 B|");
        let count = |n| Count(n).to_string();
        assert_eq!([count(0), count(999), count(1000), count(1_234_567)], ["0", "999", "1,000", "1,234,567"]);
    }
}
