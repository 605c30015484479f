//! Services as endpoints, and the accounts to ask them by.

use super::ObjectStorage;
use super::names::Site;
use crate::config::{KeyFiles, Service, ServiceKind};
use crate::error::{Error, ErrorKind, Result};
use crate::objectfs::settings::{Credentials, Endpoint};
use crate::objectfs::store::services::named;
pub(super) use crate::objectfs::store::services::{PATIENCE, STALL};
use crate::secrets::Secrets;

/// What a service is usually like.
fn usual(kind: ServiceKind) -> Result<Endpoint> {
    // One of an unknown kind is asked for little.
    let name = if kind == ServiceKind::Generic { ServiceKind::CephRgw.name() } else { kind.name() };
    named(name).ok_or_else(|| Error::new(ErrorKind::Internal, format!("nobody knows services of the kind {name}")))
}

pub(super) fn endpoint_of(service: &Service) -> Result<Endpoint> {
    let usual = usual(service.kind)?;
    let ca = service.ca.as_ref().map(|file| {
        std::fs::read_to_string(file).map_err(|error| {
            let what = format!("cannot read the certificates of service {} in {}", service.name, file.display());
            Error::caused(ErrorKind::Precondition, what, error)
        })
    });
    Ok(Endpoint {
        url: service.url.clone().or(usual.url),
        region: service.region.clone().unwrap_or(usual.region),
        path_style: service.path_style.unwrap_or(usual.path_style),
        ca: ca.transpose()?,
        checksums: service.checksums.unwrap_or(usual.checksums),
        ..usual
    })
}

impl ObjectStorage {
    /// `None`: it is not configured here.
    pub(super) fn endpoint(&self, site: &Site) -> Result<Option<Endpoint>> {
        match site {
            Site::Named(name) => self.service(name).map(endpoint_of).transpose(),
            Site::Given(given) => {
                let usual = usual(ServiceKind::Generic)?;
                Ok(Some(Endpoint {
                    url: Some(given.url.clone()),
                    region: given.region.clone().unwrap_or(usual.region),
                    path_style: given.path_style.unwrap_or(usual.path_style),
                    checksums: given.checksums.unwrap_or(usual.checksums),
                    ..usual
                }))
            }
        }
    }

    /// What a call brings, or else what the configuration has for this service, or else `None`: what the environment has.
    pub(super) fn credentials(&self, site: &Site, secrets: &Secrets) -> Result<Option<Credentials>> {
        if let Some(brought) = brought(secrets)? {
            return Ok(Some(brought));
        }
        let Site::Named(name) = site else { return Ok(None) };
        self.service(name).map_or(Ok(None), configured)
    }
}

/// The names of a key id, its secret and its token: ours, the environment's, and those of older drivers.
const NAMES: [[&str; 3]; 3] = [
    ["accessKeyId", "secretAccessKey", "sessionToken"],
    ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"],
    ["accessKeyID", "secretAccessKey", "sessionToken"],
];

/// What the call's secret has.
///
/// # Errors
/// `Denied` for half of a pair, and for a secret with nothing of it.
pub(super) fn brought(secrets: &Secrets) -> Result<Option<Credentials>> {
    for [id, secret, token] in NAMES {
        let get = |key: &str| secrets.reveal(key).map(str::trim).filter(|value| !value.is_empty());
        match (get(id), get(secret)) {
            (Some(access_key), Some(secret_key)) => {
                let usable = |text: &str| text.chars().all(|c| c.is_ascii_graphic());
                let session_token = get(token);
                if !usable(access_key) || !usable(secret_key) || !session_token.is_none_or(usable) {
                    fail!(Denied, "the secret's {id}, {secret} or {token} has characters that no key has");
                }
                return Ok(Some(Credentials {
                    access_key: access_key.to_owned(),
                    secret_key: secret_key.to_owned(),
                    session_token: session_token.map(str::to_owned),
                }));
            }
            (Some(_), None) => fail!(Denied, "the secret has {id}, but no {secret}"),
            _ => {}
        }
    }
    if secrets.reveal("secretAccessKey").is_some() || secrets.reveal("AWS_SECRET_ACCESS_KEY").is_some() {
        fail!(Denied, "the secret has a secret access key, but no accessKeyId");
    }
    if !secrets.is_empty() {
        // With the driver's own keys instead, who mistypes a name would get rights that nobody meant to give.
        fail!(
            Denied,
            "the secret has neither accessKeyId and secretAccessKey nor AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        );
    }
    Ok(None)
}

/// What the configuration has for a service.
pub(super) fn configured(service: &Service) -> Result<Option<Credentials>> {
    service.keys.as_ref().map(|keys| from_files(keys, &service.name)).transpose()
}

fn from_files(keys: &KeyFiles, service: &str) -> Result<Credentials> {
    let read = |file: &std::path::Path| {
        std::fs::read_to_string(file).map(|text| text.trim().to_owned()).map_err(|error| {
            let what = format!("cannot read a key of service {service} in {}", file.display());
            Error::caused(ErrorKind::Precondition, what, error)
        })
    };
    Ok(Credentials {
        access_key: read(&keys.access_key)?,
        secret_key: read(&keys.secret_key)?,
        session_token: keys.session_token.as_deref().map(read).transpose()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn secrets(pairs: &[(&str, &str)]) -> Secrets {
        Secrets::new(pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())))
    }

    #[test]
    fn a_secret_has_a_pair_under_one_of_its_names() {
        let found = brought(&secrets(&[("accessKeyId", "id\n"), ("secretAccessKey", "s"), ("sessionToken", "t")]));
        let found = found.unwrap().unwrap();
        assert_eq!((found.access_key.as_str(), found.session_token.as_deref()), ("id", Some("t")));
        assert!(brought(&secrets(&[("AWS_ACCESS_KEY_ID", "id"), ("AWS_SECRET_ACCESS_KEY", "s")])).unwrap().is_some());
        assert!(brought(&secrets(&[("accessKeyID", "id"), ("secretAccessKey", "s")])).unwrap().is_some());
        assert!(brought(&Secrets::default()).unwrap().is_none());
        for half in [
            // Not the driver's own keys instead: a name may be mistyped.
            &[("access_key_id", "id"), ("secret_access_key", "s")][..],
            &[("accessKeyId", "id")],
            &[("secretAccessKey", "s")],
            &[("accessKeyId", "i d"), ("secretAccessKey", "s")],
        ] {
            assert_eq!(brought(&secrets(half)).unwrap_err().kind(), ErrorKind::Denied);
        }
    }
}
