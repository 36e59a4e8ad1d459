//! `#[derive(JobArgs)]`: a struct of named fields becomes the `key=value` arguments of a job.
//!
//! ```text
//! /// doc comment            the help text
//! #[arg(default = "5s")]    given as text and parsed like what a user types; without it the argument is required
//! #[arg(guarded)]           its value is part of what a job's state means: a run with another value is refused
//! window: Duration,         any type with `ArgValue`
//! ```
//!
//! The generated code names the facade (`::tidemill`); a crate without it says
//! `#[job_args(crate = "tidemill_stream")]` on the struct. All the rules are in the trait's module (`args` of
//! tidemill-stream); this crate only lists the fields.

use proc_macro2::TokenStream;
use quote::quote;
use syn::{
    Data, DeriveInput, Expr, Field, Fields, Lit, LitStr, Meta, Path, parse_macro_input, spanned::Spanned,
};

/// Derives `JobArgs` for a struct of named fields. See the crate's head for the attributes.
#[proc_macro_derive(JobArgs, attributes(arg, job_args))]
pub fn job_args(input: proc_macro::TokenStream) -> proc_macro::TokenStream {
    let input = parse_macro_input!(input as DeriveInput);
    expand(&input).unwrap_or_else(syn::Error::into_compile_error).into()
}

fn expand(input: &DeriveInput) -> syn::Result<TokenStream> {
    let Data::Struct(data) = &input.data else {
        return Err(syn::Error::new(
            input.span(),
            "JobArgs is derived for a struct: each field is an argument",
        ));
    };
    let fields = match &data.fields {
        Fields::Named(fields) => fields.named.iter().collect::<Vec<_>>(),
        Fields::Unit => Vec::new(),
        Fields::Unnamed(_) => {
            return Err(syn::Error::new(
                input.span(),
                "JobArgs needs named fields: a field's name is the argument's",
            ));
        }
    };
    if !input.generics.params.is_empty() {
        return Err(syn::Error::new(input.generics.span(), "JobArgs cannot be derived for a generic struct"));
    }
    let krate = facade(input)?;
    let args = fields.iter().map(|f| Arg::of(f)).collect::<syn::Result<Vec<_>>>()?;
    let specs = args.iter().map(|a| a.spec(&krate));
    let (idents, names): (Vec<_>, Vec<_>) = args.iter().map(|a| (a.ident, &a.name)).unzip();
    let ident = &input.ident;
    let body = match &data.fields {
        Fields::Unit => quote! { ::core::result::Result::Ok(Self) },
        _ => quote! { ::core::result::Result::Ok(Self { #( #idents: values.take(#names)?, )* }) },
    };
    Ok(quote! {
        #[automatically_derived]
        impl #krate::args::JobArgs for #ident {
            const ARGS: &'static [#krate::args::ArgSpec] = &[ #( #specs ),* ];

            fn from_values(values: &mut #krate::args::ArgValues) -> ::core::result::Result<Self, #krate::args::ArgError> {
                let _ = &values;
                #body
            }

            fn values(&self) -> ::std::vec::Vec<(&'static str, ::std::string::String)> {
                ::std::vec![ #( (#names, #krate::args::ArgValue::text(&self.#idents)) ),* ]
            }
        }
    })
}

/// The crate the generated code refers to.
fn facade(input: &DeriveInput) -> syn::Result<Path> {
    let mut krate: Path = syn::parse_quote!(::tidemill);
    for attr in input.attrs.iter().filter(|a| a.path().is_ident("job_args")) {
        attr.parse_nested_meta(|meta| {
            if !meta.path.is_ident("crate") {
                return Err(meta.error("expected `crate = \"path\"`"));
            }
            krate = meta.value()?.parse::<LitStr>()?.parse()?;
            Ok(())
        })?;
    }
    Ok(krate)
}

/// One field.
struct Arg<'a> {
    ident: &'a syn::Ident,
    name: String,
    ty: &'a syn::Type,
    help: String,
    default: Option<LitStr>,
    guarded: bool,
}

impl<'a> Arg<'a> {
    fn of(field: &'a Field) -> syn::Result<Self> {
        let ident = field.ident.as_ref().ok_or_else(|| syn::Error::new(field.span(), "a named field"))?;
        let name = ident.to_string().trim_start_matches("r#").to_owned();
        let mut arg = Arg { ident, name, ty: &field.ty, help: help(field), default: None, guarded: false };
        for attr in field.attrs.iter().filter(|a| a.path().is_ident("arg")) {
            attr.parse_nested_meta(|meta| {
                if meta.path.is_ident("default") {
                    arg.default = Some(meta.value()?.parse()?);
                } else if meta.path.is_ident("guarded") {
                    arg.guarded = true;
                } else {
                    return Err(meta.error("known here: `default = \"text\"`, `guarded`"));
                }
                Ok(())
            })?;
        }
        Ok(arg)
    }

    fn spec(&self, krate: &Path) -> TokenStream {
        let Arg { name, ty, help, guarded, .. } = self;
        let default = match &self.default {
            Some(text) => quote! { ::core::option::Option::Some(#text) },
            None => quote! { ::core::option::Option::None },
        };
        quote! {
            #krate::args::ArgSpec {
                name: #name,
                kind: <#ty as #krate::args::ArgValue>::KIND,
                help: #help,
                default: #default,
                guarded: #guarded,
            }
        }
    }
}

/// The doc comment as one line of text.
fn help(field: &Field) -> String {
    let mut lines = Vec::new();
    for attr in &field.attrs {
        if let Meta::NameValue(meta) = &attr.meta
            && meta.path.is_ident("doc")
            && let Expr::Lit(lit) = &meta.value
            && let Lit::Str(text) = &lit.lit
        {
            lines.push(text.value().trim().to_owned());
        }
    }
    lines.join(" ").trim().to_owned()
}
