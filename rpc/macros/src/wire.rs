//! `#[derive(Wire)]`: the schema of a type and its least encoded size, as constants.

use proc_macro2::TokenStream;
use quote::quote;
use syn::ext::IdentExt;
use syn::spanned::Spanned;
use syn::{Attribute, Data, DeriveInput, Error, Fields, GenericParam, Result};

pub(crate) fn derive(item: TokenStream) -> Result<TokenStream> {
    let mut item: DeriveInput = syn::parse2(item)?;
    refuse_serde(&item.attrs)?;
    for parameter in &mut item.generics.params {
        match parameter {
            GenericParam::Lifetime(lifetime) => {
                return Err(Error::new(lifetime.span(), "a wire type owns what it holds: no lifetimes"));
            }
            GenericParam::Type(parameter) => parameter.bounds.push(syn::parse_quote!(::tidemill_rpc::Wire)),
            GenericParam::Const(_) => {}
        }
    }
    let ident = &item.ident;
    let name = ident.unraw().to_string();
    let (schema, least) = match &item.data {
        Data::Struct(data) => {
            let (fields, least) = fields(&data.fields)?;
            (quote!(::tidemill_rpc::Schema::Struct { name: #name, fields: #fields }), least)
        }
        Data::Enum(data) => {
            if data.variants.is_empty() {
                return Err(Error::new(ident.span(), "an enum without variants has no value to send"));
            }
            let mut entries = Vec::new();
            let mut leasts = Vec::new();
            for variant in &data.variants {
                refuse_serde(&variant.attrs)?;
                let name = variant.ident.unraw().to_string();
                let (fields, least) = fields(&variant.fields)?;
                entries.push(quote!(::tidemill_rpc::Variant { name: #name, fields: #fields }));
                leasts.push(least);
            }
            let schema = quote!(::tidemill_rpc::Schema::Enum { name: #name, variants: &[#(#entries),*] });
            (schema, quote!(1 + ::tidemill_rpc::__private::least(&[#(#leasts),*])))
        }
        Data::Union(data) => {
            return Err(Error::new(data.union_token.span(), "a union has no schema"));
        }
    };
    let (parameters, arguments, where_clause) = item.generics.split_for_impl();
    Ok(quote! {
        #[automatically_derived]
        impl #parameters ::tidemill_rpc::Wire for #ident #arguments #where_clause {
            const SCHEMA: &'static ::tidemill_rpc::Schema = &#schema;
            const MIN: usize = #least;
        }
    })
}

/// The fields as a slice of `Field`, and the sum of their least sizes.
fn fields(fields: &Fields) -> Result<(TokenStream, TokenStream)> {
    let mut entries = Vec::new();
    let mut leasts = Vec::new();
    for (index, field) in fields.iter().enumerate() {
        refuse_serde(&field.attrs)?;
        let name = field.ident.as_ref().map_or_else(|| index.to_string(), |ident| ident.unraw().to_string());
        let kind = &field.ty;
        entries.push(quote!(::tidemill_rpc::Field {
            name: #name,
            schema: <#kind as ::tidemill_rpc::Wire>::SCHEMA,
        }));
        leasts.push(quote!(<#kind as ::tidemill_rpc::Wire>::MIN));
    }
    Ok((quote!(&[#(#entries),*]), quote!(0 #(+ #leasts)*)))
}

/// A serde attribute could change the encoding behind the schema's back.
fn refuse_serde(attrs: &[Attribute]) -> Result<()> {
    for attr in attrs.iter().filter(|attr| attr.path().is_ident("serde")) {
        attr.parse_nested_meta(|meta| {
            if meta.path.is_ident("bound") || meta.path.is_ident("crate") {
                meta.value()?.parse::<syn::LitStr>()?;
                return Ok(());
            }
            Err(meta
                .error("a wire type is encoded as declared: of serde's attributes only `bound` and `crate`"))
        })?;
    }
    Ok(())
}
