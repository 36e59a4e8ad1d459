//! Reads the trait under `#[service]` and refuses what cannot travel, pointing at the token.

use std::time::Duration;

use proc_macro2::{Span, TokenStream};
use syn::ext::IdentExt;
use syn::meta::ParseNestedMeta;
use syn::parse::Parser;
use syn::spanned::Spanned;
use syn::{
    Attribute, Error, FnArg, GenericArgument, GenericParam, Ident, ItemTrait, LitStr, Pat, PathArguments,
    ReceiverKind, Result, ReturnType, TraitItem, TraitItemFn, Type, TypeParamBound,
};

/// A trait that can be served.
pub(crate) struct Service {
    pub(crate) name: String,
    pub(crate) item: ItemTrait,
    pub(crate) methods: Vec<Method>,
}

/// One method, with its attachment taken apart from arguments and result.
pub(crate) struct Method {
    /// Without `#[rpc]`.
    pub(crate) attrs: Vec<Attribute>,
    pub(crate) ident: Ident,
    /// The name on the wire.
    pub(crate) name: String,
    pub(crate) id: u64,
    pub(crate) arguments: Vec<(Ident, Type)>,
    pub(crate) attachment: Option<(Ident, Type)>,
    pub(crate) output: Type,
    pub(crate) value: Type,
    pub(crate) answers_attachment: bool,
    pub(crate) error: Type,
    pub(crate) idempotent: bool,
    pub(crate) timeout: Option<Duration>,
}

impl Method {
    /// The `cfg` attributes: everything generated for the method carries them.
    pub(crate) fn cfgs(&self) -> Vec<&Attribute> {
        cfgs(&self.attrs)
    }
}

pub(crate) fn cfgs(attrs: &[Attribute]) -> Vec<&Attribute> {
    attrs.iter().filter(|attr| attr.path().is_ident("cfg")).collect()
}

pub(crate) fn parse(arguments: TokenStream, item: TokenStream) -> Result<Service> {
    let name = service_name(arguments)?;
    let mut item: ItemTrait = syn::parse2(item)?;
    check_trait(&item)?;
    let mut methods: Vec<Method> = Vec::new();
    let mut errors: Option<Error> = None;
    let mut refuse = |error: Error| match &mut errors {
        Some(all) => all.combine(error),
        None => errors = Some(error),
    };
    for entry in std::mem::take(&mut item.items) {
        let TraitItem::Fn(function) = entry else {
            refuse(Error::new(entry.span(), "a service trait holds methods only"));
            continue;
        };
        match method(&name, function) {
            Ok((method, at)) => {
                let clash = methods.iter().find(|other| {
                    let alternatives =
                        other.ident == method.ident && !other.cfgs().is_empty() && !method.cfgs().is_empty();
                    other.id == method.id && !alternatives
                });
                if let Some(other) = clash {
                    let text = format!(
                        "method id {:#018x} of `{name}.{}` is also that of `{}`: give one of them another #[rpc(name = \"...\")]",
                        method.id, method.name, other.ident
                    );
                    refuse(Error::new(at, text));
                }
                methods.push(method);
            }
            Err(error) => refuse(error),
        }
    }
    match errors {
        Some(errors) => Err(errors),
        None => Ok(Service { name, item, methods }),
    }
}

fn service_name(arguments: TokenStream) -> Result<String> {
    let mut name: Option<LitStr> = None;
    let parser = syn::meta::parser(|meta: ParseNestedMeta<'_>| {
        if meta.path.is_ident("name") {
            name = Some(meta.value()?.parse()?);
            return Ok(());
        }
        Err(unknown(&meta, "#[service]", "name = \"echo.v1\""))
    });
    parser.parse2(arguments)?;
    let Some(name) = name else {
        return Err(Error::new(Span::call_site(), "a service needs a name: #[service(name = \"echo.v1\")]"));
    };
    check_name(&name)?;
    Ok(name.value())
}

fn check_name(name: &LitStr) -> Result<()> {
    let text = name.value();
    let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    if text.is_empty() || text.len() > 200 || !text.chars().all(fits) {
        return Err(Error::new(name.span(), "a wire name is 1 to 200 of a-z A-Z 0-9 . _ -"));
    }
    Ok(())
}

fn unknown(meta: &ParseNestedMeta<'_>, place: &str, known: &str) -> Error {
    let path = &meta.path;
    let given = quote::quote!(#path).to_string();
    meta.error(format!("unknown attribute `{given}` in {place}; known: {known}"))
}

fn check_trait(item: &ItemTrait) -> Result<()> {
    for parameter in &item.generics.params {
        if let GenericParam::Lifetime(lifetime) = parameter {
            return Err(Error::new(
                lifetime.span(),
                "a service trait has no lifetimes: what travels is owned",
            ));
        }
    }
    let has = |wanted: &str| {
        item.supertraits.iter().any(|bound| match bound {
            TypeParamBound::Trait(bound) => {
                bound.path.segments.last().is_some_and(|last| last.ident == wanted)
            }
            TypeParamBound::Lifetime(lifetime) => wanted == "static" && lifetime.ident == "static",
            _ => false,
        })
    };
    if !(has("Send") && has("Sync") && has("static")) {
        let text = format!(
            "a service is shared between tasks: write `trait {}: Send + Sync + 'static`",
            item.ident.unraw()
        );
        return Err(Error::new(item.ident.span(), text));
    }
    Ok(())
}

/// The method, and where its wire name was written.
fn method(service: &str, function: TraitItemFn) -> Result<(Method, Span)> {
    let TraitItemFn { attrs, sig, default, .. } = function;
    if sig.asyncness.is_none() {
        return Err(Error::new(sig.fn_token.span, "a service method is an `async fn`"));
    }
    if let Some(body) = default {
        return Err(Error::new(body.span(), "a service method has no body: the implementation gives it"));
    }
    if !sig.generics.params.is_empty() {
        let text = "a service method has no generics of its own: put them on the trait";
        return Err(Error::new(sig.generics.params.span(), text));
    }
    let options = options(&attrs)?;
    let (name, at) = match &options.name {
        Some(name) => (name.value(), name.span()),
        None => (sig.ident.unraw().to_string(), sig.ident.span()),
    };

    let mut inputs = sig.inputs.iter();
    match inputs.next() {
        Some(FnArg::Receiver(receiver)) => match &receiver.kind {
            ReceiverKind::Reference(_, _, None) => {}
            ReceiverKind::Reference(_, _, Some(mutable)) => {
                let text = "calls run at the same time: take `&self` and put what changes behind a lock";
                return Err(Error::new(mutable.span, text));
            }
            _ => return Err(Error::new(receiver.span(), "a service method takes `&self`")),
        },
        Some(other) => return Err(Error::new(other.span(), "a service method takes `&self` first")),
        None => return Err(Error::new(sig.paren_token.span.join(), "a service method takes `&self`")),
    }

    let mut arguments = Vec::new();
    let mut attachment: Option<(Ident, Type)> = None;
    for input in inputs {
        let FnArg::Typed(argument) = input else {
            return Err(Error::new(input.span(), "`self` comes first"));
        };
        if let Some((_, kind)) = &attachment {
            return Err(Error::new(kind.span(), "an Attachment is the last argument, and there is one"));
        }
        if let Some(attr) = argument.attrs.first() {
            return Err(Error::new(
                attr.span(),
                "no attributes on arguments: they would change the signature",
            ));
        }
        let Pat::Ident(pattern) = &*argument.pat else {
            return Err(Error::new(argument.pat.span(), "an argument has a plain name"));
        };
        let kind = (*argument.ty).clone();
        check_type(&kind)?;
        if is_attachment(&kind) {
            attachment = Some((pattern.ident.clone(), kind));
        } else {
            arguments.push((pattern.ident.clone(), kind));
        }
    }
    if arguments.len() > 16 {
        let text = "at most 16 arguments travel: use a struct with #[derive(Wire)]";
        return Err(Error::new(arguments[16].1.span(), text));
    }

    let ReturnType::Type(_, output) = &sig.output else {
        return Err(Error::new(
            sig.ident.span(),
            "a service method returns `Result<T, E>`: every call can fail",
        ));
    };
    let (answer, error) = result_of(output)?;
    let (value, answers_attachment) = match &answer {
        Type::Tuple(tuple) if tuple.elems.len() == 2 && is_attachment(&tuple.elems[1]) => {
            (tuple.elems[0].clone(), true)
        }
        other if is_attachment(other) => {
            return Err(Error::new(other.span(), "an Attachment comes with a value: `(T, Attachment)`"));
        }
        other => (other.clone(), false),
    };
    check_type(&value)?;
    let id = fnv(&format!("{service}.{name}"));
    let attrs = attrs.into_iter().filter(|attr| !attr.path().is_ident("rpc")).collect();
    let method = Method {
        attrs,
        ident: sig.ident,
        name,
        id,
        arguments,
        attachment,
        output: (**output).clone(),
        value,
        answers_attachment,
        error,
        idempotent: options.idempotent,
        timeout: options.timeout,
    };
    Ok((method, at))
}

#[derive(Default)]
struct Options {
    idempotent: bool,
    timeout: Option<Duration>,
    name: Option<LitStr>,
}

const KNOWN: &str = "idempotent, timeout = \"2s\", name = \"wire_name\"";

fn options(attrs: &[Attribute]) -> Result<Options> {
    let mut options = Options::default();
    for attr in attrs.iter().filter(|attr| attr.path().is_ident("rpc")) {
        attr.parse_nested_meta(|meta| {
            if meta.path.is_ident("idempotent") {
                options.idempotent = true;
            } else if meta.path.is_ident("timeout") {
                options.timeout = Some(duration(&meta.value()?.parse()?)?);
            } else if meta.path.is_ident("name") {
                let name: LitStr = meta.value()?.parse()?;
                check_name(&name)?;
                options.name = Some(name);
            } else {
                return Err(unknown(&meta, "#[rpc]", KNOWN));
            }
            Ok(())
        })?;
    }
    Ok(options)
}

fn duration(text: &LitStr) -> Result<Duration> {
    let value = text.value();
    let digits = value.len() - value.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let (number, unit) = value.split_at(digits);
    let unit_us: u64 = match unit {
        "us" => 1,
        "ms" => 1_000,
        "s" => 1_000_000,
        "m" => 60_000_000,
        _ => 0,
    };
    // The budget on the wire is 32 bits of microseconds.
    match number.parse::<u64>().ok().and_then(|n| n.checked_mul(unit_us)) {
        Some(us) if (1..=u64::from(u32::MAX)).contains(&us) => Ok(Duration::from_micros(us)),
        _ => Err(Error::new(text.span(), "a timeout is a number with us, ms, s or m, up to 71m: \"2s\"")),
    }
}

fn result_of(output: &Type) -> Result<(Type, Type)> {
    let missing = |text: &str| Err(Error::new(output.span(), text));
    let Type::Path(path) = output else {
        return missing("a service method returns `Result<T, E>`: every call can fail");
    };
    let Some(last) = path.path.segments.last().filter(|last| last.ident == "Result") else {
        return missing("a service method returns `Result<T, E>`: every call can fail");
    };
    let types: Vec<&Type> = match &last.arguments {
        PathArguments::AngleBracketed(list) => list.args.iter().filter_map(type_of).collect(),
        _ => Vec::new(),
    };
    match types[..] {
        [value, error] => Ok((value.clone(), error.clone())),
        _ => missing("write both types: `Result<T, E>`"),
    }
}

fn type_of(argument: &GenericArgument) -> Option<&Type> {
    match argument {
        GenericArgument::Type(kind) => Some(kind),
        _ => None,
    }
}

fn last_segment(kind: &Type) -> Option<&syn::PathSegment> {
    match kind {
        Type::Path(path) => path.path.segments.last(),
        _ => None,
    }
}

fn is_attachment(kind: &Type) -> bool {
    last_segment(kind).is_some_and(|last| last.ident == "Attachment" && last.arguments.is_empty())
}

fn check_type(kind: &Type) -> Result<()> {
    if let Type::Reference(reference) = kind {
        return Err(Error::new(reference.and_token.span, "what travels is owned: no references"));
    }
    if let Type::ImplTrait(kind) = kind {
        return Err(Error::new(kind.span(), "what travels has a named type"));
    }
    if let Some(last) = last_segment(kind).filter(|last| last.ident == "Vec")
        && let PathArguments::AngleBracketed(list) = &last.arguments
        && let Some(element) = list.args.first().and_then(type_of)
        && last_segment(element).is_some_and(|element| element.ident == "u8")
    {
        let text = "`Vec<u8>` would travel byte by byte: use `Bytes`, or `Attachment` for large ones";
        return Err(Error::new(kind.span(), text));
    }
    Ok(())
}

/// FNV-1a, 64 bits: the method id of `service.method`.
pub(crate) fn fnv(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}
