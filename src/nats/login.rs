//! What a NATS server is to know us by: nothing, user and password, a token, or a key that signs what it sends.
//!
//! Files are read anew for each connection, so that a renewed one counts from the next on. No message holds anything
//! of what is in them. In clear the `nats` crate logs in ([`Login::options`]); in a tunnel, which is where TLS is, the
//! crate is told no secret and the tunnel itself adds what belongs into CONNECT ([`Login::fields`]).

use std::fs;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, anyhow, bail};
use data_encoding::BASE64URL_NOPAD;
use nkeys::KeyPair;
use serde_json::{Map, Value};

use crate::config::{NatsAuth, Secret};
use crate::tls;

/// What precedes the user's JWT in a `.creds` file.
const JWT_FOLLOWS: &str = "-----BEGIN NATS USER JWT-----";

/// How we log in, with all that is needed for it.
#[derive(Clone)]
pub(super) enum Login {
    None,
    UserPassword(String, Secret),
    Token(Secret),
    /// The key of a user, and its JWT if the server knows the user by that.
    Key(Arc<KeyPair>, Option<Secret>),
}

impl Login {
    /// Reads what stands in files.
    ///
    /// # Errors
    /// A file that cannot be read or used, named.
    pub(super) fn read(auth: &NatsAuth) -> Result<Login> {
        Ok(match auth {
            NatsAuth::None => Login::None,
            NatsAuth::UserPassword(user, password) => Login::UserPassword(user.clone(), password.clone()),
            NatsAuth::Token(token) => Login::Token(token.clone()),
            NatsAuth::NkeyFile(path) => Login::Key(Arc::new(key(path, &content(path)?)?), None),
            NatsAuth::CredentialsFile(path) => {
                let text = content(path)?;
                let jwt = jwt(&text).with_context(|| format!("{}: holds no user JWT", path.display()))?;
                Login::Key(Arc::new(key(path, &text)?), Some(jwt))
            }
        })
    }

    /// Whether logging in sends something that others could log in with.
    pub(super) fn tells_secret(&self) -> bool {
        matches!(self, Login::UserPassword(..) | Login::Token(_))
    }

    /// What a server said, without what it was told to let us in, which it may repeat.
    pub(super) fn hidden_in(&self, said: &str) -> String {
        match self {
            Login::UserPassword(_, secret) | Login::Token(secret) | Login::Key(_, Some(secret)) => {
                secret.hidden_in(said)
            }
            Login::None | Login::Key(_, None) => said.to_owned(),
        }
    }

    /// The crate's options for it.
    pub(super) fn options(&self) -> nats::Options {
        match self {
            Login::None => nats::Options::new(),
            Login::UserPassword(user, password) => nats::Options::with_user_pass(user, password.expose()),
            Login::Token(token) => nats::Options::with_token(token.expose()),
            Login::Key(pair, jwt) => {
                let (pair, public) = (pair.clone(), pair.public_key());
                // A key that was read from a seed always signs.
                let sign = move |nonce: &[u8]| pair.sign(nonce).unwrap_or_default();
                match jwt.clone() {
                    Some(jwt) => nats::Options::with_jwt(move || Ok(jwt.expose().to_owned()), sign),
                    None => nats::Options::with_nkey(&public, sign),
                }
            }
        }
    }

    /// The fields of CONNECT for it; `nonce` is what the server's greeting asks to be signed.
    ///
    /// # Errors
    /// There is nothing to sign.
    pub(super) fn fields(&self, nonce: Option<&str>) -> Result<Map<String, Value>> {
        let mut fields = Map::new();
        let mut add = |name: &str, value: &str| drop(fields.insert(name.to_owned(), value.into()));
        match self {
            Login::None => {}
            Login::UserPassword(user, password) => {
                add("user", user);
                add("pass", password.expose());
            }
            Login::Token(token) => add("auth_token", token.expose()),
            Login::Key(pair, jwt) => {
                let Some(nonce) = nonce else { bail!("the server asks for no signature: it knows no keys") };
                let signed = pair.sign(nonce.as_bytes()).map_err(|_| anyhow!("the key does not sign"))?;
                add("sig", &BASE64URL_NOPAD.encode(&signed));
                match jwt {
                    Some(jwt) => add("jwt", jwt.expose()),
                    None => add("nkey", &pair.public_key()),
                }
            }
        }
        Ok(fields)
    }
}

fn content(path: &Path) -> Result<String> {
    tls::is_private(path).map_err(|why| anyhow!(why))?;
    fs::read_to_string(path).with_context(|| format!("{}: cannot be read", path.display()))
}

/// The key whose seed stands in a line of its own.
fn key(path: &Path, text: &str) -> Result<KeyPair> {
    let seed = text.lines().map(str::trim).find(|line| line.starts_with("SU"));
    let seed = seed.with_context(|| format!("{}: holds no seed of a user (SU...)", path.display()))?;
    KeyPair::from_seed(seed).map_err(|_| anyhow!("{}: its seed is damaged", path.display()))
}

fn jwt(text: &str) -> Option<Secret> {
    let mut lines = text.lines().map(str::trim).skip_while(|line| *line != JWT_FOLLOWS).skip(1);
    lines.find(|line| !line.is_empty()).map(Secret::new)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn files_are_read_as_the_tools_write_them() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        let pair = KeyPair::new_user();
        let seed = pair.seed().unwrap();
        let mode = |mode: u32| fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        let read = |text: &str, auth: fn(std::path::PathBuf) -> NatsAuth| {
            fs::write(&path, text).unwrap();
            mode(0o600);
            Login::read(&auth(path.clone())).map_err(|error| format!("{error:#}"))
        };
        let creds = format!(
            "-----BEGIN NATS USER JWT-----\r\neyJ0.eyJq.c2ln\r\n------END NATS USER JWT------\r\n\r\n\
             -----BEGIN USER NKEY SEED-----\r\n{seed}\r\n------END USER NKEY SEED------\r\n"
        );
        let Ok(Login::Key(read_pair, Some(jwt))) = read(&creds, NatsAuth::CredentialsFile) else { panic!() };
        assert_eq!((read_pair.public_key(), jwt.expose()), (pair.public_key(), "eyJ0.eyJq.c2ln"));
        let Ok(Login::Key(read_pair, None)) = read(&format!("{seed}\n"), NatsAuth::NkeyFile) else {
            panic!()
        };
        assert_eq!(read_pair.public_key(), pair.public_key());

        let damaged = seed.replace(&seed[8..10], "77");
        for text in ["", "hello\n", damaged.as_str(), &format!("{JWT_FOLLOWS}\nabc\n"), seed.as_str()] {
            let Err(error) = read(text, NatsAuth::CredentialsFile) else { panic!("{text}") };
            assert!(error.contains(path.to_str().unwrap()) && !error.contains(&seed[2..]), "{error}");
        }
        let Err(error) = read(&damaged, NatsAuth::NkeyFile) else { panic!() };
        assert!(error.contains("damaged") && !error.contains(&damaged), "{error}");
        for auth in [NatsAuth::NkeyFile, NatsAuth::CredentialsFile] {
            fs::write(&path, &creds).unwrap();
            mode(0o644);
            let error = Login::read(&auth(path.clone())).err().unwrap().to_string();
            assert!(error.contains("mode 0644 lets others have the key"), "{error}");
        }
        let missing = Login::read(&NatsAuth::NkeyFile("/nowhere/seed".into())).err().unwrap();
        assert!(format!("{missing:#}").contains("/nowhere/seed: cannot be read"), "{missing:#}");
    }

    #[test]
    fn each_way_has_its_fields() {
        let fields = |login: Login| login.fields(Some("nonce")).unwrap();
        assert!(fields(Login::None).is_empty());
        let user = fields(Login::UserPassword("u\"".into(), Secret::new("p\"")));
        assert_eq!(Value::from(user), serde_json::json!({"user": "u\"", "pass": "p\""}));
        let token = fields(Login::Token(Secret::new("t")));
        assert_eq!(Value::from(token), serde_json::json!({"auth_token": "t"}));
        let pair = Arc::new(KeyPair::new_user());
        let nkey = fields(Login::Key(pair.clone(), None));
        assert_eq!(nkey["nkey"], pair.public_key());
        let signature = BASE64URL_NOPAD.decode(nkey["sig"].as_str().unwrap().as_bytes()).unwrap();
        pair.verify(b"nonce", &signature).unwrap();
        let jwt = fields(Login::Key(pair.clone(), Some(Secret::new("j"))));
        assert!(jwt["jwt"] == "j" && jwt.contains_key("sig") && !jwt.contains_key("nkey"));
        assert!(Login::Key(pair, None).fields(None).is_err());
    }
}
