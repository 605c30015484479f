//! What the environment and the files of the AWS command line say about S3: for `berth mount`, and for workers.

use std::path::{Path, PathBuf};

use crate::error::{Error, ErrorKind, Result};
use crate::objectfs::settings::Credentials;

/// How a worker finds credentials that nobody has given it: none of these is a secret.
const FOR_WORKERS: [&str; 16] = [
    "AWS_CONFIG_FILE",
    "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_EC2_METADATA_DISABLED",
    "AWS_EC2_METADATA_SERVICE_ENDPOINT",
    "AWS_EC2_METADATA_SERVICE_ENDPOINT_MODE",
    "AWS_PROFILE",
    "AWS_ROLE_ARN",
    "AWS_ROLE_SESSION_NAME",
    "AWS_SHARED_CREDENTIALS_FILE",
    "AWS_STS_REGIONAL_ENDPOINTS",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "RUST_BACKTRACE",
    "SSL_CERT_DIR",
    "SSL_CERT_FILE",
];

/// Answers for a variable of the environment.
pub type Environment<'a> = &'a dyn Fn(&str) -> Option<String>;

/// What a person has in the environment, under the names that the AWS command line uses.
pub struct Aws<'a> {
    environment: Environment<'a>,
}

impl Aws<'_> {
    /// Looks at this process' environment.
    pub fn of_this_process() -> Aws<'static> {
        #[expect(clippy::disallowed_methods, reason = "config is the one place")]
        Aws { environment: &|name| std::env::var(name).ok() }
    }

    /// Looks at another one.
    pub fn new(environment: Environment<'_>) -> Aws<'_> {
        Aws { environment }
    }

    /// One that is set to nothing is not set.
    fn get(&self, name: &str) -> Option<String> {
        (self.environment)(name).filter(|value| !value.is_empty())
    }

    /// `AWS_ENDPOINT_URL_S3`, else `AWS_ENDPOINT_URL`.
    pub fn endpoint(&self) -> Option<String> {
        self.get("AWS_ENDPOINT_URL_S3").or_else(|| self.get("AWS_ENDPOINT_URL"))
    }

    /// `AWS_REGION`, else `AWS_DEFAULT_REGION`.
    pub fn region(&self) -> Option<String> {
        self.get("AWS_REGION").or_else(|| self.get("AWS_DEFAULT_REGION"))
    }

    /// `AWS_CA_BUNDLE`: a file.
    pub fn ca_bundle(&self) -> Option<PathBuf> {
        self.get("AWS_CA_BUNDLE").map(PathBuf::from)
    }

    /// Credentials of a named profile; else those in the environment; else those of the default profile. `None`: what the
    /// SDK finds (web identity, the instance).
    ///
    /// # Errors
    /// `Invalid` when a named file or profile is not there, or half of a pair is missing.
    pub fn credentials(&self, file: Option<&Path>, profile: Option<&str>) -> Result<Option<Credentials>> {
        let pair = (self.get("AWS_ACCESS_KEY_ID"), self.get("AWS_SECRET_ACCESS_KEY"));
        match pair {
            _ if file.is_some() || profile.is_some() => {}
            (Some(access_key), Some(secret_key)) => {
                let session_token = self.get("AWS_SESSION_TOKEN");
                return Ok(Some(Credentials { access_key, secret_key, session_token }));
            }
            (None, None) => {}
            _ => fail!(Invalid, "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY belong together: one of them is missing"),
        }
        let usual = || Some(PathBuf::from(self.get("HOME")?).join(".aws/credentials"));
        let path = file
            .map(Path::to_owned)
            .or_else(|| self.get("AWS_SHARED_CREDENTIALS_FILE").map(PathBuf::from))
            .or_else(usual);
        let named = file.is_some() || profile.is_some();
        let profile = profile.map(str::to_owned).or_else(|| self.get("AWS_PROFILE")).unwrap_or("default".to_owned());
        let Some(path) = path else { return Ok(None) };
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(_) if !named => return Ok(None),
            Err(error) => {
                return Err(Error::caused(ErrorKind::Invalid, format!("cannot read {}", path.display()), error));
            }
        };
        match parse_profile(&text, &profile) {
            None if named => fail!(Invalid, "{} has no profile {profile} with keys", path.display()),
            found => Ok(found),
        }
    }

    /// What workers get to see of it: where credentials are to be had, and none themselves.
    pub fn for_workers(&self) -> Vec<(String, String)> {
        let given = FOR_WORKERS.iter().filter_map(|name| Some(((*name).to_owned(), self.get(name)?)));
        // glibc gives each thread an arena of its own otherwise, and none of them gives memory back.
        given.chain([("MALLOC_ARENA_MAX".to_owned(), "2".to_owned())]).collect()
    }
}

/// A section of an INI file as the AWS command line writes it.
fn parse_profile(text: &str, profile: &str) -> Option<Credentials> {
    let mut inside = false;
    let (mut access_key, mut secret_key, mut session_token) = (None, None, None);
    for line in text.lines().map(str::trim).filter(|line| !line.starts_with(['#', ';'])) {
        if let Some(name) = line.strip_prefix('[').and_then(|line| line.strip_suffix(']')) {
            inside = name.trim() == profile;
        } else if let Some((key, value)) = line.split_once('=')
            && inside
        {
            let value = Some(value.trim().to_owned()).filter(|value| !value.is_empty());
            match key.trim() {
                "aws_access_key_id" => access_key = value,
                "aws_secret_access_key" => secret_key = value,
                "aws_session_token" => session_token = value,
                _ => {}
            }
        }
    }
    Some(Credentials { access_key: access_key?, secret_key: secret_key?, session_token })
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: &str = "# comment\n[default]\naws_access_key_id = A\naws_secret_access_key=S=1\n\n[ two ]\n\
                        aws_secret_access_key = T\naws_access_key_id = B\naws_session_token = X\n[half]\naws_access_key_id = C\n";

    fn keys(credentials: Option<Credentials>) -> Option<(String, String, Option<String>)> {
        credentials.map(|all| (all.access_key, all.secret_key, all.session_token))
    }

    #[test]
    fn a_profile_is_found_by_its_name() {
        let found = |name| keys(parse_profile(FILE, name));
        assert_eq!(found("default"), Some(("A".into(), "S=1".into(), None)));
        assert_eq!(found("two"), Some(("B".into(), "T".into(), Some("X".into()))));
        assert_eq!(found("half"), None);
        assert_eq!(found("none"), None);
    }

    #[test]
    fn the_environment_comes_before_the_default_profile_and_a_named_one_before_both() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("credentials");
        std::fs::write(&path, FILE).unwrap();
        let file = path.to_str().unwrap().to_owned();
        let environment = |name: &str| match name {
            "AWS_ACCESS_KEY_ID" => Some("E".to_owned()),
            "AWS_SECRET_ACCESS_KEY" => Some("canary".to_owned()),
            "AWS_SHARED_CREDENTIALS_FILE" => Some(file.clone()),
            _ => None,
        };
        let aws = Aws::new(&environment);
        assert_eq!(keys(aws.credentials(None, None).unwrap()).unwrap().0, "E");
        assert_eq!(keys(aws.credentials(None, Some("two")).unwrap()).unwrap().0, "B");
        assert_eq!(keys(aws.credentials(Some(&path), None).unwrap()).unwrap().0, "A");
        assert!(aws.credentials(None, Some("none")).unwrap_err().to_string().contains("no profile none"));
        assert!(!format!("{:?}", aws.for_workers()).contains("canary"));
        let half = |name: &str| (name == "AWS_ACCESS_KEY_ID").then(|| "E".to_owned());
        assert!(Aws::new(&half).credentials(None, None).is_err());
        assert_eq!(Aws::new(&|_| None).credentials(None, None).unwrap(), None);
    }
}
