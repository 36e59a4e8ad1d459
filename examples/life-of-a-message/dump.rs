//! Bytes with a name for each field, and claims about them that are checked.
//!
//! ```text
//!       at  bytes                     field             what they say
//!       17* 2b 61 0e f5               crc32c            of everything behind it
//!         └ differs from run to run
//! ```

use std::io::{self, Write as _};

use anyhow::{Context as _, Result, ensure};

/// Bytes in a line.
const WIDTH: usize = 8;

/// Prints a paragraph.
pub(crate) fn text(text: &str) -> Result<()> {
    Ok(writeln!(io::stdout().lock(), "{text}")?)
}

/// A step of the story: what happens, and the file of the source that does it.
pub(crate) fn step(number: u32, title: &str, source: &str) -> Result<()> {
    text(&format!("\n{number}. {title}\n   source: {source}\n"))
}

/// Says something that is checked here and now.
pub(crate) fn claim(holds: bool, what: &str) -> Result<()> {
    ensure!(holds, "this does not hold: {what}");
    text(&format!("   = {what}"))
}

/// Whether a field is the same in every run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Is {
    Fixed,
    /// It holds a time, a checksum over one, a random id, or what came before by chance.
    Varying,
}

/// Walks over bytes from the front and prints what it passes.
#[derive(Debug)]
pub(crate) struct Walk<'a> {
    bytes: &'a [u8],
    at: usize,
    /// A number that differs from run to run, and is written in as many bytes as it needs, was passed: where a field
    /// behind it lies says nothing any more.
    shifted: bool,
}

impl<'a> Walk<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0, shifted: false }
    }

    pub(crate) fn at(&self) -> usize {
        self.at
    }

    pub(crate) fn rest(&self) -> &'a [u8] {
        self.bytes.get(self.at..).unwrap_or_default()
    }

    /// A field of `len` bytes; `say` tells what they mean.
    pub(crate) fn field(
        &mut self,
        len: usize,
        name: &str,
        is: Is,
        say: impl FnOnce(&'a [u8]) -> String,
    ) -> Result<&'a [u8]> {
        let field = self.rest().get(..len).with_context(|| format!("the bytes end within {name}"))?;
        print((!self.shifted).then_some(self.at), field, name, is, &say(field))?;
        self.at += len;
        Ok(field)
    }

    /// A big-endian number of `N` bytes.
    pub(crate) fn big<const N: usize>(&mut self, name: &str, is: Is, note: &str) -> Result<i64> {
        let field = self.field(N, name, is, |bytes| noted(signed(bytes), note))?;
        Ok(signed(field))
    }

    /// A little-endian number of `N` bytes.
    pub(crate) fn little<const N: usize>(&mut self, name: &str, is: Is, note: &str) -> Result<u64> {
        let number = |bytes: &[u8]| bytes.iter().rev().fold(0u64, |n, b| n << 8 | u64::from(*b));
        let field = self.field(N, name, is, |bytes| noted(number(bytes), note))?;
        Ok(number(field))
    }

    /// A number of as many bytes as it needs, seven bits in each; the lowest bit is its sign.
    pub(crate) fn zigzag(&mut self, name: &str, is: Is, note: &str) -> Result<i64> {
        let (number, len) = varint(self.rest()).with_context(|| format!("the bytes end within {name}"))?;
        let number = (number >> 1) as i64 ^ -((number & 1) as i64);
        self.field(len, name, is, |_| noted(number, note))?;
        self.shifted |= is == Is::Varying;
        Ok(number)
    }

    /// The same without a sign.
    pub(crate) fn unsigned(&mut self, name: &str, is: Is, say: impl FnOnce(u64) -> String) -> Result<u64> {
        let (number, len) = varint(self.rest()).with_context(|| format!("the bytes end within {name}"))?;
        self.field(len, name, is, |_| say(number))?;
        self.shifted |= is == Is::Varying;
        Ok(number)
    }

    /// Bytes that are text.
    pub(crate) fn text(&mut self, len: usize, name: &str) -> Result<&'a [u8]> {
        self.field(len, name, Is::Fixed, |bytes| format!("{:?}", String::from_utf8_lossy(bytes)))
    }

    /// Passes over bytes that were shown before.
    pub(crate) fn skip(&mut self, len: usize, what: &str) -> Result<&'a [u8]> {
        let field = self.rest().get(..len).with_context(|| format!("the bytes end within {what}"))?;
        text(&format!("{:>8}  ... {len} bytes: {what}", self.at))?;
        self.at += len;
        Ok(field)
    }
}

fn noted(number: impl std::fmt::Display, note: &str) -> String {
    if note.is_empty() { number.to_string() } else { format!("{number} ({note})") }
}

fn signed(bytes: &[u8]) -> i64 {
    let start = if bytes.first().is_some_and(|b| b & 0x80 != 0) { -1 } else { 0 };
    bytes.iter().fold(start, |n, b| n << 8 | i64::from(*b))
}

fn varint(bytes: &[u8]) -> Option<(u64, usize)> {
    let mut number = 0;
    for (i, byte) in bytes.iter().take(10).enumerate() {
        number |= u64::from(byte & 0x7f) << (7 * i);
        if byte & 0x80 == 0 {
            return Some((number, i + 1));
        }
    }
    None
}

fn print(at: Option<usize>, field: &[u8], name: &str, is: Is, meaning: &str) -> Result<()> {
    let mark = if is == Is::Varying { '*' } else { ' ' };
    let mut out = io::stdout().lock();
    for (line, bytes) in field.chunks(WIDTH).enumerate() {
        let hex: Vec<String> = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        let at = at.map_or_else(|| "..".to_owned(), |at| (at + line * WIDTH).to_string());
        match line {
            0 => writeln!(out, "{at:>8}{mark} {:<23}  {name:<18} {meaning}", hex.join(" "))?,
            _ => writeln!(out, "{at:>8}{mark} {}", hex.join(" "))?,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_read() {
        let bytes = [0xff, 0xfe, 0x34, 0x12, 0xac, 0x02, 0x01, 0xac, 0x02];
        let mut walk = Walk::new(&bytes);
        assert_eq!(walk.big::<2>("", Is::Fixed, "").unwrap(), -2);
        assert_eq!(walk.little::<2>("", Is::Fixed, "").unwrap(), 0x1234);
        assert_eq!(walk.zigzag("", Is::Fixed, "").unwrap(), 150);
        assert_eq!(walk.zigzag("", Is::Fixed, "").unwrap(), -1);
        assert_eq!(walk.unsigned("", Is::Fixed, |n| n.to_string()).unwrap(), 300);
        assert!(walk.field(1, "nothing", Is::Fixed, |_| String::new()).is_err(), "there is no more");
    }
}
