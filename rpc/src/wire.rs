//! Schemas of what travels: compared in the handshake, so that skew is a precise error.
//!
//! The body is encoded by serde without names or types, so two builds that disagree about a struct
//! would misread each other silently. `#[derive(Wire)]` gives each type its [`Schema`] as a constant;
//! [`signature`] folds those of a method's arguments and result into 64 bits, compared per method
//! when a connection opens.
//!
//! Invariants:
//! * A schema holds the names of fields and variants, their order and their types, recursively.
//!   The type's own name is kept for messages and not folded: renaming a struct changes nothing on the wire.
//! * A type that contains itself has no schema (the constant would be a cycle), so decoding has bounded depth.
//! * An element of a collection takes at most 32 bytes of memory per byte of its least encoded size:
//!   a hostile length cannot make decoding allocate more than 100 times what arrived. Asserted when compiled.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::hash::{BuildHasher, Hash};

use bytes::Bytes;
use serde::{Serialize, de::DeserializeOwned};

/// A type that may travel in the body of a request or an answer. Derive it, with `Serialize` and `Deserialize`.
///
/// ```
/// # use serde::{Deserialize, Serialize};
/// use tidemill_rpc::Wire;
///
/// #[derive(Serialize, Deserialize, Wire)]
/// struct Entry {
///     name: String,
///     size: Option<u64>,
/// }
/// const LEAST: usize = <Vec<Entry> as Wire>::MIN;
/// assert_eq!((Entry::MIN, LEAST), (2, 1));
/// ```
///
/// A type that contains itself has no schema:
///
/// ```compile_fail,E0391
/// # use serde::{Deserialize, Serialize};
/// # use tidemill_rpc::{Schema, Wire};
/// #[derive(Serialize, Deserialize, Wire)]
/// struct Tree {
///     children: Vec<Tree>,
/// }
/// const SCHEMA: &Schema = Tree::SCHEMA;
/// ```
///
/// Elements of collections that are large in memory and may be small on the wire, or nothing, do not compile:
///
/// ```compile_fail,E0080
/// # use serde::{Deserialize, Serialize};
/// # use tidemill_rpc::{Schema, Wire};
/// #[derive(Serialize, Deserialize, Wire)]
/// enum Large {
///     Small,
///     Big([u64; 8]),
/// }
/// const SCHEMA: &Schema = <Vec<Large> as Wire>::SCHEMA;
/// ```
///
/// ```compile_fail,E0080
/// # use tidemill_rpc::{Schema, Wire};
/// const SCHEMA: &Schema = <Vec<()> as Wire>::SCHEMA;
/// ```
#[diagnostic::on_unimplemented(
    message = "`{Self}` cannot travel",
    note = "derive `Serialize`, `Deserialize` and `tidemill_rpc::Wire` for it, or use a type that has them"
)]
pub trait Wire: Serialize + DeserializeOwned + Send + 'static {
    /// Names, order and field types, recursively.
    const SCHEMA: &'static Schema;
    /// The least number of bytes a value takes in the body.
    const MIN: usize;
}

/// The shape of a wire type.
#[derive(Debug, PartialEq, Eq)]
pub enum Schema {
    /// A type the codec knows by itself.
    Leaf(&'static str),
    /// Present or not.
    Option(&'static Schema),
    /// Any number of one type.
    Seq(&'static Schema),
    /// Any number of pairs.
    Map(&'static Schema, &'static Schema),
    /// A fixed number of one type.
    Array(&'static Schema, usize),
    /// One of each, without names.
    Tuple(&'static [&'static Schema]),
    /// Fields; those of a tuple struct are named by their index.
    Struct {
        /// The Rust name, for messages.
        name: &'static str,
        /// In the order of declaration, which is that of the encoding.
        fields: &'static [Field],
    },
    /// One of several; the variant's position is what travels.
    Enum {
        /// The Rust name, for messages.
        name: &'static str,
        /// In the order of declaration.
        variants: &'static [Variant],
    },
}

/// A field of a struct or of a variant.
#[derive(Debug, PartialEq, Eq)]
pub struct Field {
    /// Its name.
    pub name: &'static str,
    /// Its type.
    pub schema: &'static Schema,
}

/// A variant of an enum.
#[derive(Debug, PartialEq, Eq)]
pub struct Variant {
    /// Its name.
    pub name: &'static str,
    /// What it holds.
    pub fields: &'static [Field],
}

/// Folds arguments, result and the places of attachments into the number the handshake compares.
pub const fn signature(
    arguments: &[&'static Schema],
    takes_attachment: bool,
    value: &'static Schema,
    answers_attachment: bool,
) -> u64 {
    let mut hash = Fold(0xcbf2_9ce4_8422_2325).number(arguments.len());
    let mut index = 0;
    while index < arguments.len() {
        hash = hash.schema(arguments[index]);
        index += 1;
    }
    hash.byte(takes_attachment as u8).schema(value).byte(answers_attachment as u8).0
}

/// FNV-1a, 64 bits, over a prefix-free rendering of the schema.
#[derive(Clone, Copy)]
struct Fold(u64);

impl Fold {
    const fn byte(self, byte: u8) -> Self {
        Self((self.0 ^ byte as u64).wrapping_mul(0x0000_0100_0000_01b3))
    }

    const fn number(mut self, number: usize) -> Self {
        let bytes = (number as u64).to_le_bytes();
        let mut index = 0;
        while index < 8 {
            self = self.byte(bytes[index]);
            index += 1;
        }
        self
    }

    const fn text(mut self, text: &str) -> Self {
        let bytes = text.as_bytes();
        self = self.number(bytes.len());
        let mut index = 0;
        while index < bytes.len() {
            self = self.byte(bytes[index]);
            index += 1;
        }
        self
    }

    const fn fields(mut self, fields: &[Field]) -> Self {
        self = self.number(fields.len());
        let mut index = 0;
        while index < fields.len() {
            self = self.text(fields[index].name).schema(fields[index].schema);
            index += 1;
        }
        self
    }

    const fn schema(self, schema: &Schema) -> Self {
        match schema {
            Schema::Leaf(name) => self.byte(1).text(name),
            Schema::Option(inner) => self.byte(2).schema(inner),
            Schema::Seq(inner) => self.byte(3).schema(inner),
            Schema::Map(key, value) => self.byte(4).schema(key).schema(value),
            Schema::Array(inner, length) => self.byte(5).number(*length).schema(inner),
            Schema::Tuple(items) => {
                let mut hash = self.byte(6).number(items.len());
                let mut index = 0;
                while index < items.len() {
                    hash = hash.schema(items[index]);
                    index += 1;
                }
                hash
            }
            Schema::Struct { fields, .. } => self.byte(7).fields(fields),
            Schema::Enum { variants, .. } => {
                let mut hash = self.byte(8).number(variants.len());
                let mut index = 0;
                while index < variants.len() {
                    hash = hash.text(variants[index].name).fields(variants[index].fields);
                    index += 1;
                }
                hash
            }
        }
    }
}

/// The least of several sizes: that of an enum's smallest variant.
pub(crate) const fn least(sizes: &[usize]) -> usize {
    let mut least = sizes[0];
    let mut index = 1;
    while index < sizes.len() {
        if sizes[index] < least {
            least = sizes[index];
        }
        index += 1;
    }
    least
}

/// The bound of this module's head on elements of collections.
const fn check_element(memory: usize, least_encoded: usize) {
    assert!(least_encoded > 0, "elements of a collection must take at least one byte on the wire");
    assert!(
        memory <= 32 * least_encoded,
        "elements of a collection may take at most 32 bytes of memory per least encoded byte: box what is large"
    );
}

macro_rules! leaves {
    ($($kind:ty = $min:literal),* $(,)?) => {$(
        impl Wire for $kind {
            const SCHEMA: &'static Schema = &Schema::Leaf(stringify!($kind));
            const MIN: usize = $min;
        }
    )*};
}

// Integers above a byte are of variable length: one byte at least.
leaves! {
    bool = 1, u8 = 1, u16 = 1, u32 = 1, u64 = 1, u128 = 1, i8 = 1, i16 = 1, i32 = 1, i64 = 1, i128 = 1,
    f32 = 4, f64 = 8, char = 1, String = 1, Bytes = 1,
}

impl<T: Wire> Wire for Option<T> {
    const SCHEMA: &'static Schema = &Schema::Option(T::SCHEMA);
    const MIN: usize = 1;
}

impl<T: Wire> Wire for Box<T> {
    const SCHEMA: &'static Schema = T::SCHEMA;
    const MIN: usize = T::MIN;
}

impl<T: Wire> Wire for Vec<T> {
    const SCHEMA: &'static Schema = {
        check_element(size_of::<T>(), T::MIN);
        &Schema::Seq(T::SCHEMA)
    };
    const MIN: usize = 1;
}

impl<T: Wire + Ord> Wire for BTreeSet<T> {
    const SCHEMA: &'static Schema = {
        check_element(size_of::<T>(), T::MIN);
        &Schema::Seq(T::SCHEMA)
    };
    const MIN: usize = 1;
}

impl<K: Wire + Ord, V: Wire> Wire for BTreeMap<K, V> {
    const SCHEMA: &'static Schema = {
        check_element(size_of::<(K, V)>(), K::MIN + V::MIN);
        &Schema::Map(K::SCHEMA, V::SCHEMA)
    };
    const MIN: usize = 1;
}

impl<K: Wire + Eq + Hash, V: Wire, S: BuildHasher + Default + Send + 'static> Wire for HashMap<K, V, S> {
    const SCHEMA: &'static Schema = {
        check_element(size_of::<(K, V)>(), K::MIN + V::MIN);
        &Schema::Map(K::SCHEMA, V::SCHEMA)
    };
    const MIN: usize = 1;
}

macro_rules! arrays {
    ($($length:literal)*) => {$(
        impl<T: Wire> Wire for [T; $length] {
            const SCHEMA: &'static Schema = &Schema::Array(T::SCHEMA, $length);
            const MIN: usize = $length * T::MIN;
        }
    )*};
}

// serde knows arrays up to 32; these are the lengths identifiers and digests have.
arrays! { 1 2 3 4 6 8 12 16 20 32 }

macro_rules! tuples {
    ($(($($name:ident)*))*) => {$(
        impl<$($name: Wire),*> Wire for ($($name,)*) {
            const SCHEMA: &'static Schema = &Schema::Tuple(&[$($name::SCHEMA),*]);
            const MIN: usize = 0 $(+ $name::MIN)*;
        }
    )*};
}

impl Wire for () {
    const SCHEMA: &'static Schema = &Schema::Tuple(&[]);
    const MIN: usize = 0;
}

tuples! { (A) (A B) (A B C) (A B C D) (A B C D E) (A B C D E F) }
