//! How a service is reached: HTTP client, TLS, region, addressing, checksums, and credentials that can be replaced.

use std::fmt;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

use aws_config::BehaviorVersion;
use aws_credential_types::provider::error::CredentialsError;
use aws_credential_types::provider::{self as provider, ProvideCredentials, SharedCredentialsProvider, future};
use aws_sdk_s3::config::retry::RetryConfig;
use aws_sdk_s3::config::timeout::TimeoutConfig;
use aws_sdk_s3::config::{
    Builder, IdentityCache, Region, RequestChecksumCalculation, ResponseChecksumValidation,
    StalledStreamProtectionConfig,
};
use aws_smithy_http_client::tls::rustls_provider::CryptoMode;
use aws_smithy_http_client::tls::{Provider, TlsContext, TrustStore};
use aws_smithy_runtime_api::client::http::SharedHttpClient;

use super::failure::{chain, failure};
use super::stall::watched;
use super::{StoreErrorKind, StoreResult};
use crate::objectfs::settings::{Checksums, Credentials, Endpoint};

/// Services close idle connections after some 20 s; one that is closed while a request is on its way costs a round trip.
const IDLE: Duration = Duration::from_secs(15);
/// A connection that is not made by then never will be.
const CONNECT: Duration = Duration::from_secs(5);
/// Credentials of the chain are asked for again so long before they expire.
const BEFORE_EXPIRY: Duration = Duration::from_secs(300);
/// After a refusal the chain is asked again, but not more often than this.
const ASK_AGAIN: Duration = Duration::from_secs(10);

/// A client of the service, and its credentials.
pub(super) async fn client(
    endpoint: &Endpoint,
    credentials: Option<&Credentials>,
) -> StoreResult<(aws_sdk_s3::Client, Wallet)> {
    let plain = endpoint.url.as_ref().is_some_and(|url| url.starts_with("http://"));
    let wallet = match credentials {
        Some(credentials) => Wallet::of(credentials),
        None if endpoint.anonymous => Wallet::default(),
        None => Wallet::chain(endpoint).await?,
    };
    let http = if plain {
        aws_smithy_http_client::Builder::new().pool_idle_timeout(IDLE).build_http()
    } else {
        tls(endpoint)?
    };
    let timeouts = TimeoutConfig::builder().connect_timeout(CONNECT).build();
    let (asked, verified) = match endpoint.checksums {
        Checksums::WhenSupported => {
            (RequestChecksumCalculation::WhenSupported, ResponseChecksumValidation::WhenRequired)
        }
        Checksums::WhenRequired => (RequestChecksumCalculation::WhenRequired, ResponseChecksumValidation::WhenRequired),
    };
    let mut config = Builder::new()
        .behavior_version(BehaviorVersion::latest())
        .region(Region::new(endpoint.region.clone()))
        .force_path_style(endpoint.path_style)
        .http_client(watched(http, Duration::from_millis(endpoint.stall.max(1))))
        .timeout_config(timeouts)
        // `patient` tries again, and `stall` finds what hangs.
        .retry_config(RetryConfig::disabled())
        .stalled_stream_protection(StalledStreamProtectionConfig::disabled())
        .identity_cache(IdentityCache::no_cache())
        .request_checksum_calculation(asked)
        // Asked for by `get` alone, and only where it applies: whole objects.
        .response_checksum_validation(verified);
    if credentials.is_some() || !endpoint.anonymous {
        config = config.credentials_provider(wallet.clone());
    }
    if let Some(url) = &endpoint.url {
        config = config.endpoint_url(url);
    }
    Ok((aws_sdk_s3::Client::from_conf(config.build()), wallet))
}

/// HTTPS, trusting the system's roots and the endpoint's own.
fn tls(endpoint: &Endpoint) -> StoreResult<SharedHttpClient> {
    let mut trusted = TrustStore::default().with_native_roots(true);
    if let Some(pem) = &endpoint.ca {
        trusted = trusted.with_pem_certificate(pem.as_bytes());
    }
    let place = endpoint.url.as_deref().unwrap_or("AWS");
    let context = TlsContext::builder().with_trust_store(trusted).build();
    let context = context.map_err(|error| failure("reach", place, StoreErrorKind::Invalid, chain(&error)))?;
    let builder = aws_smithy_http_client::Builder::new().pool_idle_timeout(IDLE);
    Ok(builder.tls_provider(Provider::Rustls(CryptoMode::Ring)).tls_context(context).build_https())
}

/// The credentials that requests are signed with: given ones, which can be replaced, or those of the SDK's chain.
#[derive(Clone, Default)]
pub(super) struct Wallet(Arc<RwLock<Content>>);

#[derive(Clone, Default)]
struct Content {
    source: Option<SharedCredentialsProvider>,
    held: Option<aws_credential_types::Credentials>,
    asked: Option<Instant>,
}

impl fmt::Debug for Wallet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("credentials")
    }
}

fn sdk(credentials: &Credentials) -> aws_credential_types::Credentials {
    let Credentials { access_key, secret_key, session_token } = credentials.clone();
    aws_credential_types::Credentials::new(access_key, secret_key, session_token, None, "berth")
}

impl Wallet {
    fn of(credentials: &Credentials) -> Self {
        let wallet = Self::default();
        wallet.replace(credentials);
        wallet
    }

    async fn chain(endpoint: &Endpoint) -> StoreResult<Self> {
        let region = Region::new(endpoint.region.clone());
        let loader = aws_config::defaults(BehaviorVersion::latest()).region(region).http_client(tls(endpoint)?);
        let source = loader.load().await.credentials_provider();
        Ok(Self(Arc::new(RwLock::new(Content { source, ..Content::default() }))))
    }

    /// Signs with these from the next request on.
    pub(super) fn replace(&self, credentials: &Credentials) {
        let mut content = self.0.write().unwrap_or_else(PoisonError::into_inner);
        *content = Content { source: None, held: Some(sdk(credentials)), asked: None };
    }

    /// The service refused. Is it worth a second attempt, since the chain is asked again?
    pub(super) fn refused(&self) -> bool {
        let mut content = self.0.write().unwrap_or_else(PoisonError::into_inner);
        let again = content.source.is_some() && content.asked.is_some_and(|asked| asked.elapsed() > ASK_AGAIN);
        if again {
            content.held = None;
        }
        again
    }

    async fn take(&self) -> provider::Result {
        let content = self.0.read().unwrap_or_else(PoisonError::into_inner).clone();
        let fresh = |credentials: &aws_credential_types::Credentials| {
            let expiry = credentials.expiry();
            expiry.is_none_or(|expiry| expiry > std::time::SystemTime::now() + BEFORE_EXPIRY)
        };
        match (content.held, content.source) {
            (Some(held), Some(_)) if fresh(&held) => Ok(held),
            (Some(held), None) => Ok(held),
            (held, Some(source)) => match source.provide_credentials().await {
                Ok(new) => {
                    let mut content = self.0.write().unwrap_or_else(PoisonError::into_inner);
                    // Unless they were replaced meanwhile.
                    if content.source.is_some() {
                        content.held = Some(new.clone());
                        content.asked = Some(Instant::now());
                    }
                    Ok(new)
                }
                // What is about to expire is good until it has.
                Err(error) => held.ok_or(error),
            },
            (None, None) => Err(CredentialsError::not_loaded("none were given")),
        }
    }
}

impl ProvideCredentials for Wallet {
    fn provide_credentials<'a>(&'a self) -> future::ProvideCredentials<'a>
    where
        Self: 'a,
    {
        future::ProvideCredentials::new(self.take())
    }
}
