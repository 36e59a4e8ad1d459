//! Snapshots of expansions, printed by prettyplease. `TIDEMILL_GOLDEN=write` writes them anew; read the diff.

use proc_macro2::TokenStream;

const SERVICE: &str = r#"
    /// An echo.
    pub(crate) trait Echo<K: Wire>: Send + Sync + 'static
    where
        K: Clone,
    {
        /// Safe to resend.
        #[rpc(idempotent, timeout = "2s")]
        async fn say(&self, text: String, key: K) -> Result<String, EchoError>;
        #[cfg(feature = "loops")]
        async fn r#loop(&self, body: Attachment) -> Result<(u64, Attachment), EchoError>;
    }
"#;

const TYPES: &str = r#"
    pub enum Choice<T> {
        Nothing,
        Pair(u8, T),
        Named { r#type: String },
    }
"#;

const ERRORS: &str = r#"
    pub enum EchoError {
        #[wire(code = 1)]
        Empty,
        #[wire(code = 2)]
        TooLong { have: u64, most: u64 },
        #[wire(rpc)]
        Rpc(RpcError),
    }
"#;

fn check(name: &str, expansion: TokenStream) {
    let printed = prettyplease::unparse(&syn::parse2(expansion).expect("the expansion is a file"));
    let path = format!("{}/tests/golden/{name}.rs", env!("CARGO_MANIFEST_DIR"));
    if std::env::var_os("TIDEMILL_GOLDEN").is_some_and(|how| how == "write") {
        std::fs::write(&path, &printed).expect("the golden is writable");
    }
    let golden = std::fs::read_to_string(&path).expect("the golden is there");
    assert!(printed == golden, "{path} differs; the expansion is now:\n{printed}");
}

#[test]
fn service_expands_to_the_snapshot() {
    let arguments = quote::quote!(name = "echo.v1");
    let service = crate::service::parse(arguments, SERVICE.parse().expect("tokens")).expect("a service");
    check("service", crate::expand::expand(&service));
}

#[test]
fn derives_expand_to_the_snapshot() {
    let wire = crate::wire::derive(TYPES.parse().expect("tokens")).expect("a wire type");
    let error = crate::wire_error::derive(ERRORS.parse().expect("tokens")).expect("a wire error");
    check("derives", quote::quote!(#wire #error));
}

/// The published constants of FNV-1a, 64 bits.
#[test]
fn method_ids_are_fnv() {
    assert_eq!(crate::service::fnv(""), 0xcbf2_9ce4_8422_2325);
    assert_eq!(crate::service::fnv("a"), 0xaf63_dc4c_8601_ec8c);
    assert_eq!(crate::service::fnv("foobar"), 0x8594_4171_f739_67e8);
}
