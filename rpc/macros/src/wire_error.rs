//! `#[derive(WireError)]`: an application error travels as a written number, a length and its fields.

use proc_macro2::{Span, TokenStream};
use quote::{format_ident, quote};
use syn::spanned::Spanned;
use syn::{Data, DeriveInput, Error, Fields, Ident, LitInt, Result, Type, Variant};

const KNOWN: &str = "code = 1 (a number of its own, never reused), rpc (the variant that holds an RpcError)";

enum Mark {
    Code(u32),
    Rpc,
}

pub(crate) fn derive(item: TokenStream) -> Result<TokenStream> {
    let item: DeriveInput = syn::parse2(item)?;
    let Data::Enum(data) = &item.data else {
        return Err(Error::new(item.ident.span(), "a wire error is an enum"));
    };
    if !item.generics.params.is_empty() {
        return Err(Error::new(item.generics.span(), "a wire error has no generics"));
    }
    let ident = &item.ident;
    let mut seen: Vec<u32> = Vec::new();
    let mut encode = Vec::new();
    let mut decode = Vec::new();
    let mut has_rpc = false;
    for variant in &data.variants {
        let (mark, at) = mark(variant)?;
        let name = &variant.ident;
        let Bound { pattern, names, kinds } = bind(&variant.fields);
        match mark {
            Mark::Rpc => {
                if names.len() != 1 || has_rpc {
                    return Err(Error::new(at, "one variant with one field holds the RpcError"));
                }
                has_rpc = true;
                encode.push(quote! {
                    Self::#name #pattern => ::tidemill_rpc::WireError::encode(#(#names)*),
                });
            }
            Mark::Code(code) => {
                if seen.contains(&code) {
                    return Err(Error::new(at, format!("code {code} is taken by another variant")));
                }
                seen.push(code);
                encode.push(quote! {
                    Self::#name #pattern => ::tidemill_rpc::ErrorBody::new(#code, &(#(#names,)*)),
                });
                decode.push(quote! {
                    #code => {
                        let (#(#names,)*) = body.fields::<(#(#kinds,)*)>()?;
                        ::core::result::Result::Ok(Self::#name #pattern)
                    }
                });
            }
        }
    }
    Ok(quote! {
        #[automatically_derived]
        impl ::tidemill_rpc::WireError for #ident {
            fn encode(&self) -> ::tidemill_rpc::ErrorBody {
                match self {
                    #(#encode)*
                }
            }

            fn decode(
                body: &::tidemill_rpc::ErrorBody,
            ) -> ::core::result::Result<Self, ::tidemill_rpc::RpcError> {
                match body.code() {
                    #(#decode)*
                    _ => ::core::result::Result::Err(body.unknown()),
                }
            }
        }
    })
}

struct Bound {
    pattern: TokenStream,
    names: Vec<Ident>,
    kinds: Vec<Type>,
}

/// A pattern that is also the constructor, the names it binds, and their types.
fn bind(fields: &Fields) -> Bound {
    let kinds = fields.iter().map(|field| field.ty.clone()).collect();
    match fields {
        Fields::Named(named) => {
            let members: Vec<&Ident> = named.named.iter().filter_map(|field| field.ident.as_ref()).collect();
            let names: Vec<Ident> = (0..members.len()).map(|index| format_ident!("__{index}")).collect();
            Bound { pattern: quote!({ #(#members: #names),* }), names, kinds }
        }
        Fields::Unnamed(unnamed) => {
            let names: Vec<Ident> =
                (0..unnamed.unnamed.len()).map(|index| format_ident!("__{index}")).collect();
            Bound { pattern: quote!((#(#names),*)), names, kinds }
        }
        Fields::Unit => Bound { pattern: quote!(), names: Vec::new(), kinds },
    }
}

fn mark(variant: &Variant) -> Result<(Mark, Span)> {
    let mut mark: Option<(Mark, Span)> = None;
    for attr in variant.attrs.iter().filter(|attr| attr.path().is_ident("wire")) {
        attr.parse_nested_meta(|meta| {
            if meta.path.is_ident("rpc") {
                mark = Some((Mark::Rpc, meta.path.span()));
                return Ok(());
            }
            if meta.path.is_ident("code") {
                let code: LitInt = meta.value()?.parse()?;
                match code.base10_parse::<u32>() {
                    Ok(number) if number > 0 => mark = Some((Mark::Code(number), code.span())),
                    _ => return Err(Error::new(code.span(), "a code is from 1 to 4294967295")),
                }
                return Ok(());
            }
            let path = &meta.path;
            let given = quote!(#path).to_string();
            Err(meta.error(format!("unknown attribute `{given}` in #[wire]; known: {KNOWN}")))
        })?;
    }
    mark.ok_or_else(|| {
        let text =
            "number the variant: #[wire(code = 1)], or #[wire(rpc)] for the one that holds an RpcError";
        Error::new(variant.ident.span(), text)
    })
}
