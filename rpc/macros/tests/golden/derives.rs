#[automatically_derived]
impl<T: ::tidemill_rpc::Wire> ::tidemill_rpc::Wire for Choice<T> {
    const SCHEMA: &'static ::tidemill_rpc::Schema = &::tidemill_rpc::Schema::Enum {
        name: "Choice",
        variants: &[
            ::tidemill_rpc::Variant {
                name: "Nothing",
                fields: &[],
            },
            ::tidemill_rpc::Variant {
                name: "Pair",
                fields: &[
                    ::tidemill_rpc::Field {
                        name: "0",
                        schema: <u8 as ::tidemill_rpc::Wire>::SCHEMA,
                    },
                    ::tidemill_rpc::Field {
                        name: "1",
                        schema: <T as ::tidemill_rpc::Wire>::SCHEMA,
                    },
                ],
            },
            ::tidemill_rpc::Variant {
                name: "Named",
                fields: &[
                    ::tidemill_rpc::Field {
                        name: "type",
                        schema: <String as ::tidemill_rpc::Wire>::SCHEMA,
                    },
                ],
            },
        ],
    };
    const MIN: usize = 1
        + ::tidemill_rpc::__private::least(
            &[
                0,
                0 + <u8 as ::tidemill_rpc::Wire>::MIN + <T as ::tidemill_rpc::Wire>::MIN,
                0 + <String as ::tidemill_rpc::Wire>::MIN,
            ],
        );
}
#[automatically_derived]
impl ::tidemill_rpc::WireError for EchoError {
    fn encode(&self) -> ::tidemill_rpc::ErrorBody {
        match self {
            Self::Empty => ::tidemill_rpc::ErrorBody::new(1u32, &()),
            Self::TooLong { have: __0, most: __1 } => {
                ::tidemill_rpc::ErrorBody::new(2u32, &(__0, __1))
            }
            Self::Rpc(__0) => ::tidemill_rpc::WireError::encode(__0),
        }
    }
    fn decode(
        body: &::tidemill_rpc::ErrorBody,
    ) -> ::core::result::Result<Self, ::tidemill_rpc::RpcError> {
        match body.code() {
            1u32 => {
                let () = body.fields::<()>()?;
                ::core::result::Result::Ok(Self::Empty)
            }
            2u32 => {
                let (__0, __1) = body.fields::<(u64, u64)>()?;
                ::core::result::Result::Ok(Self::TooLong {
                    have: __0,
                    most: __1,
                })
            }
            _ => ::core::result::Result::Err(body.unknown()),
        }
    }
}
