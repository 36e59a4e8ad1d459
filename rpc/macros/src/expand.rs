//! Writes the code of a service: the trait, `XClient`, `XServer`, `AnyX`, and `X for Arc<T>`.

use proc_macro2::TokenStream;
use quote::{format_ident, quote};
use syn::ext::IdentExt;
use syn::{Attribute, GenericParam, Generics, Ident, WhereClause};

use crate::service::{Method, Service, cfgs};

/// The whole expansion, in the order a reader wants it.
pub(crate) fn expand(service: &Service) -> TokenStream {
    let names = Names::new(service);
    let definition = definition(service);
    let client = client(service, &names);
    let server = server(service, &names);
    let any = any(service, &names);
    let arc = arc(service, &names);
    quote! { #definition #client #server #any #arc }
}

/// What several parts refer to.
struct Names {
    client: Ident,
    server: Ident,
    any: Ident,
    erased: Ident,
    /// `<K>`, as arguments.
    arguments: TokenStream,
    /// Parameters with their bounds, each followed by a comma.
    parameters: TokenStream,
    /// Parameter names, each followed by a comma.
    plain: TokenStream,
    where_clause: Option<WhereClause>,
    /// Carries the parameters without owning a value of them.
    marker: TokenStream,
    cfgs: Vec<Attribute>,
}

impl Names {
    fn new(service: &Service) -> Self {
        let ident = service.item.ident.unraw();
        let generics = without_defaults(&service.item.generics);
        let (_, arguments, where_clause) = generics.split_for_impl();
        let parameters = &generics.params;
        let plain: Vec<&Ident> = generics
            .params
            .iter()
            .filter_map(|parameter| match parameter {
                GenericParam::Type(parameter) => Some(&parameter.ident),
                GenericParam::Const(parameter) => Some(&parameter.ident),
                GenericParam::Lifetime(_) => None,
            })
            .collect();
        let types: Vec<&Ident> = generics.type_params().map(|parameter| &parameter.ident).collect();
        let parameters: Vec<&GenericParam> = parameters.iter().collect();
        Self {
            client: format_ident!("{ident}Client"),
            server: format_ident!("{ident}Server"),
            any: format_ident!("Any{ident}"),
            erased: format_ident!("__{ident}Erased"),
            arguments: quote!(#arguments),
            parameters: quote!(#(#parameters,)*),
            plain: quote!(#(#plain,)*),
            where_clause: where_clause.cloned(),
            marker: quote!(::core::marker::PhantomData<fn() -> (#(#types,)*)>),
            cfgs: cfgs(&service.item.attrs).into_iter().cloned().collect(),
        }
    }
}

fn without_defaults(generics: &Generics) -> Generics {
    let mut generics = generics.clone();
    for parameter in &mut generics.params {
        match parameter {
            GenericParam::Type(parameter) => parameter.default = None,
            GenericParam::Const(parameter) => parameter.default = None,
            GenericParam::Lifetime(_) => {}
        }
    }
    generics
}

impl Method {
    /// `(&self, a: A, body: Attachment)`, with `receiver` in front.
    fn inputs(&self, receiver: TokenStream) -> TokenStream {
        let arguments =
            self.arguments.iter().chain(&self.attachment).map(|(name, kind)| quote!(#name: #kind));
        quote!((#receiver #(, #arguments)*))
    }

    /// `(a, body)`, with `receiver` in front.
    fn pass(&self, receiver: TokenStream) -> TokenStream {
        let receiver = (!receiver.is_empty()).then_some(receiver);
        let names = self.arguments.iter().chain(&self.attachment).map(|(name, _)| quote!(#name));
        let all = receiver.into_iter().chain(names);
        quote!((#(#all),*))
    }

    /// The arguments in the body, as a tuple's value and type.
    fn body(&self) -> (TokenStream, TokenStream) {
        let (names, kinds): (Vec<_>, Vec<_>) = self.arguments.iter().map(|(name, kind)| (name, kind)).unzip();
        (quote!((#(#names,)*)), quote!((#(#kinds,)*)))
    }

    fn future(&self) -> TokenStream {
        let output = &self.output;
        quote!(impl ::core::future::Future<Output = #output> + ::core::marker::Send)
    }

    fn constant(&self) -> Ident {
        format_ident!("__METHOD_{}", self.ident.unraw())
    }
}

/// The trait itself: each `async fn` becomes its desugaring with `Send`.
fn definition(service: &Service) -> TokenStream {
    let item = &service.item;
    let (attrs, vis, unsafety, ident) = (&item.attrs, &item.vis, &item.unsafety, &item.ident);
    let (generics, supertraits) = (&item.generics, &item.supertraits);
    let where_clause = &item.generics.where_clause;
    let methods = service.methods.iter().map(|method| {
        let (attrs, ident) = (&method.attrs, &method.ident);
        let (inputs, future) = (method.inputs(quote!(&self)), method.future());
        quote!(#(#attrs)* fn #ident #inputs -> #future;)
    });
    quote! {
        #(#attrs)*
        #vis #unsafety trait #ident #generics : #supertraits #where_clause {
            #(#methods)*
        }
    }
}

fn client(service: &Service, names: &Names) -> TokenStream {
    let (vis, ident, wire_name) = (&service.item.vis, &service.item.ident, &service.name);
    let Names { client, arguments, parameters, where_clause, marker, cfgs, .. } = names;
    let constants = service.methods.iter().map(|method| constant(service, method));
    let list = service.methods.iter().map(|method| {
        let (cfgs, constant) = (method.cfgs(), method.constant());
        quote!(#(#cfgs)* Self::#constant)
    });
    let methods = service.methods.iter().map(|method| {
        let (cfgs, ident) = (method.cfgs(), &method.ident);
        let (inputs, future) = (method.inputs(quote!(&self)), method.future());
        let (values, kinds) = method.body();
        let (value, error, constant) = (&method.value, &method.error, method.constant());
        let attachment = match &method.attachment {
            Some((name, _)) => quote!(#name),
            None => quote!(::tidemill_rpc::Attachment::default()),
        };
        let call = if method.answers_attachment { quote!(call_attached) } else { quote!(call) };
        quote! {
            #(#cfgs)*
            fn #ident #inputs -> #future {
                ::tidemill_rpc::__private::#call::<#kinds, #value, #error>(
                    &self.client, Self::#constant, #values, #attachment,
                )
            }
        }
    });
    let doc =
        format!(" Calls [`{}`] at the other end of a connection: the stub is the trait.", ident.unraw());
    quote! {
        #(#cfgs)*
        #[doc = #doc]
        #vis struct #client<#parameters> #where_clause {
            client: ::tidemill_rpc::Client,
            marker: #marker,
        }

        #(#cfgs)*
        impl<#parameters> #client #arguments #where_clause {
            /// The name of the service on the wire.
            pub const SERVICE: &'static str = #wire_name;
            /// The methods, with the signatures that the handshake compares.
            pub const METHODS: &'static [::tidemill_rpc::Method] = &[#(#list),*];
            #(#constants)*

            /// A stub over a connection; any number of stubs share one.
            pub fn new(client: ::tidemill_rpc::Client) -> Self {
                Self { client, marker: ::core::marker::PhantomData }
            }

            /// The connection under the stub.
            pub fn client(&self) -> &::tidemill_rpc::Client {
                &self.client
            }
        }

        #(#cfgs)*
        impl<#parameters> ::core::clone::Clone for #client #arguments #where_clause {
            fn clone(&self) -> Self {
                Self::new(::core::clone::Clone::clone(&self.client))
            }
        }

        #(#cfgs)*
        impl<#parameters> ::core::fmt::Debug for #client #arguments #where_clause {
            fn fmt(&self, f: &mut ::core::fmt::Formatter<'_>) -> ::core::fmt::Result {
                f.debug_struct(::core::stringify!(#client)).field("client", &self.client).finish()
            }
        }

        #(#cfgs)*
        impl<#parameters> #ident #arguments for #client #arguments #where_clause {
            #(#methods)*
        }
    }
}

/// The `Method` of one method, as a constant both sides use.
fn constant(service: &Service, method: &Method) -> TokenStream {
    let (cfgs, constant, id) = (method.cfgs(), method.constant(), method.id);
    let (service, name) = (&service.name, &method.name);
    let kinds = method.arguments.iter().map(|(_, kind)| quote!(<#kind as ::tidemill_rpc::Wire>::SCHEMA));
    let value = &method.value;
    let (takes, answers) = (method.attachment.is_some(), method.answers_attachment);
    let idempotent = method.idempotent;
    let timeout = match method.timeout {
        Some(timeout) => {
            // Checked against u32 where it was read.
            let us = timeout.as_micros() as u64;
            quote!(::core::option::Option::Some(::core::time::Duration::from_micros(#us)))
        }
        None => quote!(::core::option::Option::None),
    };
    quote! {
        #(#cfgs)*
        #[doc(hidden)]
        #[allow(non_upper_case_globals)]
        pub const #constant: ::tidemill_rpc::Method = ::tidemill_rpc::Method {
            service: #service,
            name: #name,
            id: #id,
            signature: ::tidemill_rpc::signature(
                &[#(#kinds),*],
                #takes,
                <#value as ::tidemill_rpc::Wire>::SCHEMA,
                #answers,
            ),
            idempotent: #idempotent,
            timeout: #timeout,
        };
    }
}

fn server(service: &Service, names: &Names) -> TokenStream {
    let (vis, ident) = (&service.item.vis, &service.item.ident);
    let Names { client, server, arguments, parameters, plain, where_clause, marker, cfgs, .. } = names;
    let arms = service.methods.iter().map(|method| {
        let (cfgs, name, id) = (method.cfgs(), &method.ident, method.id);
        let (values, kinds) = method.body();
        let pass = method.pass(quote!(&*__service));
        let body = if method.attachment.is_some() { quote!(args_attached) } else { quote!(args) };
        let binding = match &method.attachment {
            Some((attachment, _)) => quote!((#values, #attachment)),
            None => values,
        };
        let reply = if method.answers_attachment { quote!(attached) } else { quote!(value) };
        quote! {
            #(#cfgs)*
            #id => {
                let __service = ::std::sync::Arc::clone(&self.service);
                ::core::option::Option::Some(::std::boxed::Box::pin(async move {
                    let #binding = match __request.#body::<#kinds>() {
                        ::core::result::Result::Ok(__args) => __args,
                        ::core::result::Result::Err(__refused) => return __refused,
                    };
                    ::tidemill_rpc::__private::Reply::#reply(
                        <__T as #ident #arguments>::#name #pass.await,
                    )
                }))
            }
        }
    });
    let arms: Vec<TokenStream> = arms.collect();
    let doc = format!(" Serves an implementation of [`{}`].", ident.unraw());
    quote! {
        #(#cfgs)*
        #[doc = #doc]
        #vis struct #server<#parameters __T: #ident #arguments> #where_clause {
            service: ::std::sync::Arc<__T>,
            marker: #marker,
        }

        #(#cfgs)*
        impl<#parameters __T: #ident #arguments> #server<#plain __T> #where_clause {
            /// Serves `service`; pass an `Arc` to keep a handle on it.
            pub fn new(service: __T) -> Self {
                Self { service: ::std::sync::Arc::new(service), marker: ::core::marker::PhantomData }
            }
        }

        #(#cfgs)*
        impl<#parameters __T: #ident #arguments> ::tidemill_rpc::Service for #server<#plain __T> #where_clause {
            fn methods(&self) -> &'static [::tidemill_rpc::Method] {
                #client::<#plain>::METHODS
            }

            fn handle(
                &self,
                __method: u64,
                __request: ::tidemill_rpc::__private::Request,
            ) -> ::core::option::Option<::tidemill_rpc::__private::Handler> {
                match __method {
                    #(#arms)*
                    _ => ::core::option::Option::None,
                }
            }
        }
    }
}

fn any(service: &Service, names: &Names) -> TokenStream {
    let (vis, ident) = (&service.item.vis, &service.item.ident);
    let Names { any, erased, arguments, parameters, where_clause, cfgs, .. } = names;
    let mangled = |method: &Method| format_ident!("__erased_{}", method.ident.unraw());
    let declared: Vec<TokenStream> = service
        .methods
        .iter()
        .map(|method| {
            let (mangled, output) = (mangled(method), &method.output);
            let inputs = method.inputs(quote!(&self));
            quote! {
                fn #mangled #inputs -> ::core::pin::Pin<::std::boxed::Box<
                    dyn ::core::future::Future<Output = #output> + ::core::marker::Send + '_,
                >>
            }
        })
        .collect();
    let method_cfgs: Vec<Vec<&Attribute>> = service.methods.iter().map(Method::cfgs).collect();
    let declarations = declared.iter().zip(&method_cfgs).map(|(line, cfgs)| quote!(#(#cfgs)* #line;));
    let forwards = service.methods.iter().zip(&declared).map(|(method, line)| {
        let (cfgs, name, pass) = (method.cfgs(), &method.ident, method.pass(quote!(self)));
        quote! {
            #(#cfgs)*
            #line {
                ::std::boxed::Box::pin(<__T as #ident #arguments>::#name #pass)
            }
        }
    });
    let methods = service.methods.iter().map(|method| {
        let (cfgs, name, mangled, pass) =
            (method.cfgs(), &method.ident, mangled(method), method.pass(quote!()));
        let (inputs, future) = (method.inputs(quote!(&self)), method.future());
        quote! {
            #(#cfgs)*
            fn #name #inputs -> #future {
                self.0.#mangled #pass
            }
        }
    });
    let doc = format!(
        " Any [`{}`], chosen at run time: local, remote, or a wrapper. A clone is a handle; a call costs one box.",
        ident.unraw()
    );
    let erased_generics = quote!(#erased #arguments);
    quote! {
        #(#cfgs)*
        #[doc(hidden)]
        trait #erased<#parameters>: ::core::marker::Send + ::core::marker::Sync + 'static #where_clause {
            #(#declarations)*
        }

        #(#cfgs)*
        impl<#parameters __T: #ident #arguments> #erased_generics for __T #where_clause {
            #(#forwards)*
        }

        #(#cfgs)*
        #[doc = #doc]
        #vis struct #any<#parameters>(::std::sync::Arc<dyn #erased_generics>) #where_clause;

        #(#cfgs)*
        impl<#parameters> #any #arguments #where_clause {
            /// Hides which implementation it is.
            pub fn new(service: impl #ident #arguments) -> Self {
                Self(::std::sync::Arc::new(service))
            }
        }

        #(#cfgs)*
        impl<#parameters> ::core::clone::Clone for #any #arguments #where_clause {
            fn clone(&self) -> Self {
                Self(::std::sync::Arc::clone(&self.0))
            }
        }

        #(#cfgs)*
        impl<#parameters> ::core::fmt::Debug for #any #arguments #where_clause {
            fn fmt(&self, f: &mut ::core::fmt::Formatter<'_>) -> ::core::fmt::Result {
                f.write_str(::core::stringify!(#any))
            }
        }

        #(#cfgs)*
        impl<#parameters> #ident #arguments for #any #arguments #where_clause {
            #(#methods)*
        }
    }
}

fn arc(service: &Service, names: &Names) -> TokenStream {
    let ident = &service.item.ident;
    let Names { arguments, parameters, where_clause, cfgs, .. } = names;
    let methods = service.methods.iter().map(|method| {
        let (cfgs, name, pass) = (method.cfgs(), &method.ident, method.pass(quote!(&**self)));
        let (inputs, future) = (method.inputs(quote!(&self)), method.future());
        quote! {
            #(#cfgs)*
            fn #name #inputs -> #future {
                <__T as #ident #arguments>::#name #pass
            }
        }
    });
    quote! {
        #(#cfgs)*
        impl<#parameters __T: #ident #arguments> #ident #arguments for ::std::sync::Arc<__T> #where_clause {
            #(#methods)*
        }
    }
}
