/// An echo.
pub(crate) trait Echo<K: Wire>: Send + Sync + 'static
where
    K: Clone,
{
    /// Safe to resend.
    fn say(
        &self,
        text: String,
        key: K,
    ) -> impl ::core::future::Future<
        Output = Result<String, EchoError>,
    > + ::core::marker::Send;
    #[cfg(feature = "loops")]
    fn r#loop(
        &self,
        body: Attachment,
    ) -> impl ::core::future::Future<
        Output = Result<(u64, Attachment), EchoError>,
    > + ::core::marker::Send;
}
/// Calls [`Echo`] at the other end of a connection: the stub is the trait.
pub(crate) struct EchoClient<K: Wire>
where
    K: Clone,
{
    client: ::tidemill_rpc::Client,
    marker: ::core::marker::PhantomData<fn() -> (K,)>,
}
impl<K: Wire> EchoClient<K>
where
    K: Clone,
{
    /// The name of the service on the wire.
    pub const SERVICE: &'static str = "echo.v1";
    /// The methods, with the signatures that the handshake compares.
    pub const METHODS: &'static [::tidemill_rpc::Method] = &[
        Self::__METHOD_say,
        #[cfg(feature = "loops")]
        Self::__METHOD_loop,
    ];
    #[doc(hidden)]
    #[allow(non_upper_case_globals)]
    pub const __METHOD_say: ::tidemill_rpc::Method = ::tidemill_rpc::Method {
        service: "echo.v1",
        name: "say",
        id: 15268444159755002482u64,
        signature: ::tidemill_rpc::signature(
            &[
                <String as ::tidemill_rpc::Wire>::SCHEMA,
                <K as ::tidemill_rpc::Wire>::SCHEMA,
            ],
            false,
            <String as ::tidemill_rpc::Wire>::SCHEMA,
            false,
        ),
        idempotent: true,
        timeout: ::core::option::Option::Some(
            ::core::time::Duration::from_micros(2000000u64),
        ),
    };
    #[cfg(feature = "loops")]
    #[doc(hidden)]
    #[allow(non_upper_case_globals)]
    pub const __METHOD_loop: ::tidemill_rpc::Method = ::tidemill_rpc::Method {
        service: "echo.v1",
        name: "loop",
        id: 9941004193282808021u64,
        signature: ::tidemill_rpc::signature(
            &[],
            true,
            <u64 as ::tidemill_rpc::Wire>::SCHEMA,
            true,
        ),
        idempotent: false,
        timeout: ::core::option::Option::None,
    };
    /// A stub over a connection; any number of stubs share one.
    pub fn new(client: ::tidemill_rpc::Client) -> Self {
        Self {
            client,
            marker: ::core::marker::PhantomData,
        }
    }
    /// The connection under the stub.
    pub fn client(&self) -> &::tidemill_rpc::Client {
        &self.client
    }
}
impl<K: Wire> ::core::clone::Clone for EchoClient<K>
where
    K: Clone,
{
    fn clone(&self) -> Self {
        Self::new(::core::clone::Clone::clone(&self.client))
    }
}
impl<K: Wire> ::core::fmt::Debug for EchoClient<K>
where
    K: Clone,
{
    fn fmt(&self, f: &mut ::core::fmt::Formatter<'_>) -> ::core::fmt::Result {
        f.debug_struct(::core::stringify!(EchoClient))
            .field("client", &self.client)
            .finish()
    }
}
impl<K: Wire> Echo<K> for EchoClient<K>
where
    K: Clone,
{
    fn say(
        &self,
        text: String,
        key: K,
    ) -> impl ::core::future::Future<
        Output = Result<String, EchoError>,
    > + ::core::marker::Send {
        ::tidemill_rpc::__private::call::<
            (String, K),
            String,
            EchoError,
        >(
            &self.client,
            Self::__METHOD_say,
            (text, key),
            ::tidemill_rpc::Attachment::default(),
        )
    }
    #[cfg(feature = "loops")]
    fn r#loop(
        &self,
        body: Attachment,
    ) -> impl ::core::future::Future<
        Output = Result<(u64, Attachment), EchoError>,
    > + ::core::marker::Send {
        ::tidemill_rpc::__private::call_attached::<
            (),
            u64,
            EchoError,
        >(&self.client, Self::__METHOD_loop, (), body)
    }
}
/// Serves an implementation of [`Echo`].
pub(crate) struct EchoServer<K: Wire, __T: Echo<K>>
where
    K: Clone,
{
    service: ::std::sync::Arc<__T>,
    marker: ::core::marker::PhantomData<fn() -> (K,)>,
}
impl<K: Wire, __T: Echo<K>> EchoServer<K, __T>
where
    K: Clone,
{
    /// Serves `service`; pass an `Arc` to keep a handle on it.
    pub fn new(service: __T) -> Self {
        Self {
            service: ::std::sync::Arc::new(service),
            marker: ::core::marker::PhantomData,
        }
    }
}
impl<K: Wire, __T: Echo<K>> ::tidemill_rpc::Service for EchoServer<K, __T>
where
    K: Clone,
{
    fn methods(&self) -> &'static [::tidemill_rpc::Method] {
        EchoClient::<K>::METHODS
    }
    fn handle(
        &self,
        __method: u64,
        __request: ::tidemill_rpc::__private::Request,
    ) -> ::core::option::Option<::tidemill_rpc::__private::Handler> {
        match __method {
            15268444159755002482u64 => {
                let __service = ::std::sync::Arc::clone(&self.service);
                ::core::option::Option::Some(
                    ::std::boxed::Box::pin(async move {
                        let (text, key) = match __request.args::<(String, K)>() {
                            ::core::result::Result::Ok(__args) => __args,
                            ::core::result::Result::Err(__refused) => return __refused,
                        };
                        ::tidemill_rpc::__private::Reply::value(
                            <__T as Echo<K>>::say(&*__service, text, key).await,
                        )
                    }),
                )
            }
            #[cfg(feature = "loops")]
            9941004193282808021u64 => {
                let __service = ::std::sync::Arc::clone(&self.service);
                ::core::option::Option::Some(
                    ::std::boxed::Box::pin(async move {
                        let ((), body) = match __request.args_attached::<()>() {
                            ::core::result::Result::Ok(__args) => __args,
                            ::core::result::Result::Err(__refused) => return __refused,
                        };
                        ::tidemill_rpc::__private::Reply::attached(
                            <__T as Echo<K>>::r#loop(&*__service, body).await,
                        )
                    }),
                )
            }
            _ => ::core::option::Option::None,
        }
    }
}
#[doc(hidden)]
trait __EchoErased<K: Wire>: ::core::marker::Send + ::core::marker::Sync + 'static
where
    K: Clone,
{
    fn __erased_say(
        &self,
        text: String,
        key: K,
    ) -> ::core::pin::Pin<
        ::std::boxed::Box<
            dyn ::core::future::Future<
                Output = Result<String, EchoError>,
            > + ::core::marker::Send + '_,
        >,
    >;
    #[cfg(feature = "loops")]
    fn __erased_loop(
        &self,
        body: Attachment,
    ) -> ::core::pin::Pin<
        ::std::boxed::Box<
            dyn ::core::future::Future<
                Output = Result<(u64, Attachment), EchoError>,
            > + ::core::marker::Send + '_,
        >,
    >;
}
impl<K: Wire, __T: Echo<K>> __EchoErased<K> for __T
where
    K: Clone,
{
    fn __erased_say(
        &self,
        text: String,
        key: K,
    ) -> ::core::pin::Pin<
        ::std::boxed::Box<
            dyn ::core::future::Future<
                Output = Result<String, EchoError>,
            > + ::core::marker::Send + '_,
        >,
    > {
        ::std::boxed::Box::pin(<__T as Echo<K>>::say(self, text, key))
    }
    #[cfg(feature = "loops")]
    fn __erased_loop(
        &self,
        body: Attachment,
    ) -> ::core::pin::Pin<
        ::std::boxed::Box<
            dyn ::core::future::Future<
                Output = Result<(u64, Attachment), EchoError>,
            > + ::core::marker::Send + '_,
        >,
    > {
        ::std::boxed::Box::pin(<__T as Echo<K>>::r#loop(self, body))
    }
}
/// Any [`Echo`], chosen at run time: local, remote, or a wrapper. A clone is a handle; a call costs one box.
pub(crate) struct AnyEcho<K: Wire>(
    ::std::sync::Arc<dyn __EchoErased<K>>,
)
where
    K: Clone;
impl<K: Wire> AnyEcho<K>
where
    K: Clone,
{
    /// Hides which implementation it is.
    pub fn new(service: impl Echo<K>) -> Self {
        Self(::std::sync::Arc::new(service))
    }
}
impl<K: Wire> ::core::clone::Clone for AnyEcho<K>
where
    K: Clone,
{
    fn clone(&self) -> Self {
        Self(::std::sync::Arc::clone(&self.0))
    }
}
impl<K: Wire> ::core::fmt::Debug for AnyEcho<K>
where
    K: Clone,
{
    fn fmt(&self, f: &mut ::core::fmt::Formatter<'_>) -> ::core::fmt::Result {
        f.write_str(::core::stringify!(AnyEcho))
    }
}
impl<K: Wire> Echo<K> for AnyEcho<K>
where
    K: Clone,
{
    fn say(
        &self,
        text: String,
        key: K,
    ) -> impl ::core::future::Future<
        Output = Result<String, EchoError>,
    > + ::core::marker::Send {
        self.0.__erased_say(text, key)
    }
    #[cfg(feature = "loops")]
    fn r#loop(
        &self,
        body: Attachment,
    ) -> impl ::core::future::Future<
        Output = Result<(u64, Attachment), EchoError>,
    > + ::core::marker::Send {
        self.0.__erased_loop(body)
    }
}
impl<K: Wire, __T: Echo<K>> Echo<K> for ::std::sync::Arc<__T>
where
    K: Clone,
{
    fn say(
        &self,
        text: String,
        key: K,
    ) -> impl ::core::future::Future<
        Output = Result<String, EchoError>,
    > + ::core::marker::Send {
        <__T as Echo<K>>::say(&**self, text, key)
    }
    #[cfg(feature = "loops")]
    fn r#loop(
        &self,
        body: Attachment,
    ) -> impl ::core::future::Future<
        Output = Result<(u64, Attachment), EchoError>,
    > + ::core::marker::Send {
        <__T as Echo<K>>::r#loop(&**self, body)
    }
}
