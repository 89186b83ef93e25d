//! A connection string, taken apart: libpq's two forms, a URL or key=value, and its words for TLS and several hosts.
//!
//! The driver's own parser knows three of the six values of `sslmode`, none of the files, and prints what it could
//! not read. So the text is read here; what the driver has to know of it is written down again in its form. Pure:
//! files are named, not opened. No message holds anything of the text but the names of parameters that libpq has.
//! The parameters are those of the chapter "Database Connection Control Functions" in PostgreSQL's manual.

use std::net::IpAddr;
use std::path::PathBuf;

use crate::config::DsnParts;
use crate::tls::{Check, Roots, Tls};

/// Port of a server that does not say.
const DEFAULT_PORT: u16 = 5432;

const FORMS: &str = "the DSN is not one: write postgresql://user:password@host:5432/database?option=value, with \
     special characters percent-encoded, or host=... user=... dbname=...";

/// What libpq knows and we do not, with what to do instead; naming it shows nothing secret.
const UNSUPPORTED: &[(&str, &str)] = &[
    (
        "sslpassword",
        "keys with a password are not supported: take it off (openssl pkey), and let file rights protect it",
    ),
    ("sslcrl", "revocation lists are not supported"),
    ("sslcrldir", "revocation lists are not supported"),
    ("sslsni", "the host name is always sent"),
    ("sslcertmode", "a certificate is sent when sslcert is there and the server asks"),
    ("ssl_min_protocol_version", "TLS 1.2 is the least"),
    ("ssl_max_protocol_version", "TLS 1.3 is the most"),
    ("passfile", "write database.password: file:/path"),
    ("service", "write the connection string out"),
    ("requirepeer", "not supported"),
    ("require_auth", "not supported; channel_binding=require leaves SCRAM alone"),
    ("gssencmode", "GSSAPI is not supported"),
    ("krbsrvname", "GSSAPI is not supported"),
    ("gsslib", "GSSAPI is not supported"),
    ("client_encoding", "it is always UTF8"),
    ("fallback_application_name", "write application_name"),
    ("sslcompression", "TLS compression does not exist any more"),
];

/// What the driver takes as it stands.
const FOR_THE_DRIVER: &[&str] = &[
    "user",
    "password",
    "dbname",
    "options",
    "application_name",
    "connect_timeout",
    "tcp_user_timeout",
    "keepalives",
    "keepalives_idle",
    "keepalives_interval",
    "keepalives_retries",
    "channel_binding",
    "sslnegotiation",
];

/// What a connection string says.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Dsn {
    /// In the order in which they are tried; at least one.
    pub(super) servers: Vec<Server>,
    /// They are tried in an order drawn anew each time.
    pub(super) shuffled: bool,
    /// What a server must be to be taken.
    pub(super) target: SessionTarget,
    pub(super) mode: SslMode,
    /// How TLS is done, where it is.
    pub(super) tls: Tls,
    pub(super) has_password: bool,
    /// The rest, in the driver's key=value form, which may hold a password.
    pub(super) rest: String,
}

/// One server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Server {
    /// A name, an address, or the folder of a socket.
    pub(super) host: String,
    /// Where it is, if that need not be looked up.
    pub(super) address: Option<IpAddr>,
    pub(super) port: u16,
}

impl Server {
    pub(super) fn is_socket(&self) -> bool {
        self.host.starts_with('/')
    }

    /// Nothing that is said to it leaves this machine.
    pub(super) fn is_local(&self) -> bool {
        let address = self.address.or_else(|| self.host.parse().ok());
        self.is_socket() || address.map_or(self.host.eq_ignore_ascii_case("localhost"), |ip| ip.is_loopback())
    }
}

/// What a server must be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum SessionTarget {
    Any,
    /// Not a standby.
    Primary,
    /// Transactions write unless they say otherwise.
    ReadWrite,
}

/// `sslmode`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum SslMode {
    Disable,
    Allow,
    Prefer,
    Require,
    VerifyCa,
    VerifyFull,
}

impl Dsn {
    /// Reads `text`; what it does not say itself is taken from `parts`.
    pub(super) fn parse(text: &str, parts: &DsnParts) -> Result<Dsn, String> {
        let mut given = Parameters(match url_rest(text) {
            Some(rest) => url_parameters(rest).ok_or(FORMS)?,
            None => key_values(text).ok_or(FORMS)?,
        });
        given.add_missing(parts);
        for (name, advice) in UNSUPPORTED {
            if given.take(name).is_some() {
                return Err(format!("the DSN has {name}, which cannot be used here: {advice}"));
            }
        }
        let servers = servers(&mut given)?;
        let target = target(given.take("target_session_attrs").as_deref(), servers.len())?;
        let shuffled = match given.take("load_balance_hosts").as_deref() {
            None | Some("disable") => false,
            Some("random") => true,
            Some(_) => return Err("the DSN's load_balance_hosts is neither disable nor random".into()),
        };
        let (mode, tls) = ssl(&mut given)?;
        let has_password = given.0.iter().any(|(name, value)| name == "password" && !value.is_empty());
        if given.0.iter().any(|(name, _)| !FOR_THE_DRIVER.contains(&name.as_str())) {
            return Err(format!("the DSN has a parameter that is not known; {FORMS}"));
        }
        Ok(Dsn { servers, shuffled, target, mode, tls, has_password, rest: given.written() })
    }

    /// Where it leads, without user and password.
    pub(super) fn address(&self) -> String {
        let servers: Vec<String> =
            self.servers.iter().map(|server| format!("{}:{}", server.host, server.port)).collect();
        servers.join(",")
    }
}

/// Names and values; the last one of a name counts.
struct Parameters(Vec<(String, String)>);

impl Parameters {
    fn take(&mut self, name: &str) -> Option<String> {
        let value = self.0.iter().rev().find(|(key, _)| key == name).map(|(_, value)| value.clone());
        self.0.retain(|(key, _)| key != name);
        value.filter(|value| !value.is_empty())
    }

    fn add_missing(&mut self, parts: &DsnParts) {
        let path = |path: &Option<PathBuf>| path.as_ref().map(|path| path.to_string_lossy().into_owned());
        let ours = [
            ("user", parts.user.clone()),
            ("password", parts.password.as_ref().map(|password| password.expose().to_owned())),
            ("sslrootcert", path(&parts.sslrootcert)),
            ("sslcert", path(&parts.sslcert)),
            ("sslkey", path(&parts.sslkey)),
        ];
        for (name, value) in ours {
            if let Some(value) = value
                && !self.0.iter().any(|(key, _)| key == name)
            {
                self.0.push((name.to_owned(), value));
            }
        }
    }

    fn written(&self) -> String {
        let escaped = |value: &str| value.replace('\\', "\\\\").replace('\'', "\\'");
        let pairs: Vec<String> =
            self.0.iter().map(|(name, value)| format!("{name}='{}'", escaped(value))).collect();
        pairs.join(" ")
    }
}

fn servers(given: &mut Parameters) -> Result<Vec<Server>, String> {
    let list = |text: Option<String>| -> Vec<String> {
        text.map(|text| text.split(',').map(|item| item.trim().to_owned()).collect()).unwrap_or_default()
    };
    let (hosts, addresses, ports) =
        (list(given.take("host")), list(given.take("hostaddr")), list(given.take("port")));
    let count = hosts.len().max(addresses.len());
    if count == 0 {
        return Err("the DSN names no host".into());
    }
    if !hosts.is_empty() && !addresses.is_empty() && hosts.len() != addresses.len() {
        return Err("the DSN has more of host than of hostaddr, or less".into());
    }
    if ports.len() > 1 && ports.len() != count {
        return Err("the DSN has neither one port nor as many as hosts".into());
    }
    (0..count)
        .map(|index| {
            let address = match addresses.get(index).filter(|text| !text.is_empty()) {
                None => None,
                Some(text) => {
                    Some(text.parse::<IpAddr>().map_err(|_| "the DSN's hostaddr is no IP address")?)
                }
            };
            let named = hosts.get(index).filter(|host| !host.is_empty()).cloned();
            let host = named.or(address.map(|ip| ip.to_string())).ok_or("the DSN has an empty host")?;
            let port = match ports.get(index).or(ports.first()).map(String::as_str) {
                None | Some("") => DEFAULT_PORT,
                Some(port) => {
                    let port = port.parse().ok().filter(|port| *port != 0);
                    port.ok_or("the DSN has a port that is not 1 to 65535")?
                }
            };
            Ok(Server { host, address, port })
        })
        .collect()
}

/// Of several servers the one that takes writes is wanted, whatever the DSN does not say.
fn target(written: Option<&str>, servers: usize) -> Result<SessionTarget, String> {
    match written {
        None if servers > 1 => Ok(SessionTarget::Primary),
        None | Some("any") => Ok(SessionTarget::Any),
        Some("primary") => Ok(SessionTarget::Primary),
        Some("read-write") => Ok(SessionTarget::ReadWrite),
        Some("read-only" | "standby" | "prefer-standby") => {
            Err("the DSN's target_session_attrs asks for a server that takes no writes; use read-write or primary".into())
        }
        Some(_) => Err("the DSN's target_session_attrs is none of any, read-write and primary".into()),
    }
}

fn ssl(given: &mut Parameters) -> Result<(SslMode, Tls), String> {
    // JDBC's word, which libpq takes in URLs.
    let required = given.take("ssl").is_some_and(|value| value == "true");
    let written = given.take("sslmode");
    let mode = match written.as_deref() {
        None if required => Some(SslMode::Require),
        None => None,
        Some("disable") => Some(SslMode::Disable),
        Some("allow") => Some(SslMode::Allow),
        Some("prefer") => Some(SslMode::Prefer),
        Some("require") => Some(SslMode::Require),
        Some("verify-ca") => Some(SslMode::VerifyCa),
        Some("verify-full") => Some(SslMode::VerifyFull),
        Some(_) => {
            let allowed = "disable, allow, prefer, require, verify-ca, verify-full";
            return Err(format!("the DSN's sslmode is none of {allowed}"));
        }
    };
    let roots = match given.take("sslrootcert") {
        None => Roots::None,
        Some(word) if word == "system" => Roots::System,
        Some(path) => Roots::File(path.into()),
    };
    let (mode, check) = checks(mode, &roots)?;
    let identity = match (given.take("sslcert"), given.take("sslkey")) {
        (None, None) => None,
        (Some(certificate), Some(key)) => Some((certificate.into(), key.into())),
        _ => return Err("the DSN's sslcert and sslkey go together; one of them is missing".into()),
    };
    Ok((mode, Tls { check, roots, identity }))
}

/// What `sslmode` and `sslrootcert` together ask for: libpq's table, without its default files in the home folder.
fn checks(mode: Option<SslMode>, roots: &Roots) -> Result<(SslMode, Check), String> {
    let plain = mode.unwrap_or(SslMode::Prefer);
    match (mode, roots) {
        (None | Some(SslMode::VerifyFull), Roots::System) => Ok((SslMode::VerifyFull, Check::ChainAndName)),
        (Some(_), Roots::System) => {
            Err("the DSN's sslrootcert=system wants sslmode=verify-full: anybody can have a certificate"
                .into())
        }
        (Some(SslMode::VerifyCa | SslMode::VerifyFull), Roots::None) => {
            Err("the DSN's sslmode verifies, and against what? Add sslrootcert=/path, or sslrootcert=system"
                .into())
        }
        (Some(SslMode::VerifyFull), Roots::File(_)) => Ok((plain, Check::ChainAndName)),
        (_, Roots::File(_)) => Ok((plain, Check::Chain)),
        (_, Roots::None) => Ok((plain, Check::Nothing)),
    }
}

fn url_rest(text: &str) -> Option<&str> {
    ["postgresql://", "postgres://"].iter().find_map(|scheme| text.strip_prefix(scheme))
}

/// `user:password@host:port,host:port/database?name=value&name=value`, each part percent-encoded.
fn url_parameters(rest: &str) -> Option<Vec<(String, String)>> {
    let (authority, tail) = rest.split_at(rest.find(['/', '?']).unwrap_or(rest.len()));
    let (path, query) = tail.split_once('?').unwrap_or((tail, ""));
    let mut found: Vec<(String, String)> = Vec::new();
    let mut add = |name: &str, value: &str| -> Option<()> {
        if !value.is_empty() {
            found.push((decoded(name)?, decoded(value)?));
        }
        Some(())
    };
    let (userinfo, hosts) = authority.rsplit_once('@').unwrap_or(("", authority));
    let (user, password) = userinfo.split_once(':').unwrap_or((userinfo, ""));
    add("user", user)?;
    add("password", password)?;
    add("dbname", path.strip_prefix('/').unwrap_or(path))?;
    let (mut names, mut ports) = (Vec::new(), Vec::new());
    for server in hosts.split(',').filter(|_| !hosts.is_empty()) {
        let (name, port) = match server.strip_prefix('[') {
            Some(bracketed) => {
                let (name, after) = bracketed.split_once(']')?;
                (name, if after.is_empty() { "" } else { after.strip_prefix(':')? })
            }
            None => server.split_once(':').unwrap_or((server, "")),
        };
        names.push(name);
        ports.push(port);
    }
    add("host", &names.join(","))?;
    if ports.iter().any(|port| !port.is_empty()) {
        add("port", &ports.join(","))?;
    }
    for parameter in query.split('&').filter(|parameter| !parameter.is_empty()) {
        let (name, value) = parameter.split_once('=')?;
        add(name, value)?;
    }
    Some(found)
}

/// Undoes percent-encoding; `None` for what is none, and for a NUL, which PostgreSQL's protocol cannot say.
fn decoded(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut pieces = text.split('%');
    bytes.extend_from_slice(pieces.next().unwrap_or_default().as_bytes());
    for piece in pieces {
        let hex = piece.get(..2).filter(|hex| hex.bytes().all(|byte| byte.is_ascii_hexdigit()))?;
        bytes.push(u8::from_str_radix(hex, 16).ok()?);
        bytes.extend_from_slice(&piece.as_bytes()[2..]);
    }
    String::from_utf8(bytes).ok().filter(|text| !text.contains('\0'))
}

/// `name=value name='value with blanks'`, with blanks around the `=` allowed and `\` before what is to be taken as it is.
fn key_values(text: &str) -> Option<Vec<(String, String)>> {
    let mut found = Vec::new();
    let mut rest = text.trim();
    while !rest.is_empty() {
        let (name, after) = rest.split_once('=')?;
        let name = name.trim_end();
        if name.is_empty() || !name.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_') {
            return None;
        }
        let (value, after) = value(after.trim_start())?;
        found.push((name.to_owned(), value));
        rest = after.trim_start();
    }
    Some(found).filter(|found| !found.is_empty() && !text.contains('\0'))
}

/// The value at the beginning of `text`, and what follows it.
fn value(text: &str) -> Option<(String, &str)> {
    let (quoted, body) = text.strip_prefix('\'').map_or((false, text), |body| (true, body));
    let mut value = String::new();
    let mut characters = body.char_indices();
    while let Some((at, character)) = characters.next() {
        match character {
            '\\' => value.push(characters.next()?.1),
            '\'' if quoted => {
                let after = &body[at + 1..];
                let ends = after.is_empty() || after.starts_with(char::is_whitespace);
                return ends.then_some((value, after));
            }
            _ if !quoted && character.is_whitespace() => return Some((value, &body[at..])),
            _ => value.push(character),
        }
    }
    (!quoted).then_some((value, ""))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Secret;

    fn parse(text: &str) -> Result<Dsn, String> {
        Dsn::parse(text, &DsnParts::default())
    }

    fn servers_of(text: &str) -> Vec<(String, Option<String>, u16)> {
        let dsn = parse(text).unwrap_or_else(|why| panic!("{text}: {why}"));
        dsn.servers.into_iter().map(|s| (s.host, s.address.map(|ip| ip.to_string()), s.port)).collect()
    }

    #[test]
    fn servers_are_read_from_both_forms() {
        let server =
            |host: &str, address: Option<&str>, port| (host.into(), address.map(str::to_owned), port);
        let cases = [
            ("postgresql://db/app", vec![server("db", None, 5432)]),
            ("postgres://u:p@db:6000", vec![server("db", None, 6000)]),
            ("postgresql://u:p@ss@db:6000", vec![server("db", None, 6000)]),
            (
                "postgresql://a,b:2,[::1]:3/app",
                vec![server("a", None, 5432), server("b", None, 2), server("::1", None, 3)],
            ),
            ("postgresql:///app?host=/run/postgresql&port=7", vec![server("/run/postgresql", None, 7)]),
            ("postgresql://%2Frun%2Fpostgresql/app", vec![server("/run/postgresql", None, 5432)]),
            ("host=a,b port=7", vec![server("a", None, 7), server("b", None, 7)]),
            (
                "host=a,b port=7,8 hostaddr=10.0.0.1,",
                vec![server("a", Some("10.0.0.1"), 7), server("b", None, 8)],
            ),
            ("hostaddr=10.0.0.1", vec![server("10.0.0.1", Some("10.0.0.1"), 5432)]),
        ];
        for (text, expected) in cases {
            assert_eq!(servers_of(text), expected, "{text}");
        }
        for text in [
            "user=u",
            "host=a,b port=1,2,3",
            "host=a,b hostaddr=::1",
            "host=a port=0",
            "host=a port=x",
            "host=a,,b",
        ] {
            assert!(parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn tls_is_what_sslmode_and_sslrootcert_ask_for_together() {
        use Check::{Chain, ChainAndName, Nothing};
        use SslMode::{Allow, Disable, Prefer, Require, VerifyCa, VerifyFull};
        let cases = [
            ("", Some((Prefer, Nothing))),
            ("sslmode=disable", Some((Disable, Nothing))),
            ("sslmode=allow", Some((Allow, Nothing))),
            ("sslmode=prefer", Some((Prefer, Nothing))),
            ("sslmode=require", Some((Require, Nothing))),
            ("ssl=true", Some((Require, Nothing))),
            ("sslmode=verify-ca", None),
            ("sslmode=verify-full", None),
            ("sslmode=nonsense", None),
            ("sslrootcert=/ca", Some((Prefer, Chain))),
            ("sslmode=allow sslrootcert=/ca", Some((Allow, Chain))),
            ("sslmode=require sslrootcert=/ca", Some((Require, Chain))),
            ("sslmode=verify-ca sslrootcert=/ca", Some((VerifyCa, Chain))),
            ("sslmode=verify-full sslrootcert=/ca", Some((VerifyFull, ChainAndName))),
            ("sslrootcert=system", Some((VerifyFull, ChainAndName))),
            ("sslmode=verify-full sslrootcert=system", Some((VerifyFull, ChainAndName))),
            ("sslmode=verify-ca sslrootcert=system", None),
            ("sslmode=require sslrootcert=system", None),
        ];
        for (words, expected) in cases {
            let parsed = parse(&format!("host=db {words}")).ok().map(|dsn| (dsn.mode, dsn.tls.check));
            assert_eq!(parsed, expected, "{words}");
            let url = format!("postgresql://db/app?{}", words.replace(' ', "&"));
            assert_eq!(parse(&url).ok().map(|dsn| (dsn.mode, dsn.tls.check)), expected, "{url}");
        }
        assert!(parse("host=db sslcert=/c sslkey=/k").unwrap().tls.identity.is_some());
        assert!(parse("host=db sslcert=/c").is_err() && parse("host=db sslkey=/k").is_err());
    }

    #[test]
    fn one_server_may_be_anything_and_several_must_take_writes() {
        use SessionTarget::{Any, Primary, ReadWrite};
        let cases = [
            ("host=a", Some(Any)),
            ("host=a,b", Some(Primary)),
            ("host=a,b target_session_attrs=any", Some(Any)),
            ("host=a target_session_attrs=primary", Some(Primary)),
            ("host=a,b target_session_attrs=read-write", Some(ReadWrite)),
            ("host=a,b target_session_attrs=standby", None),
            ("host=a,b target_session_attrs=read-only", None),
            ("host=a,b target_session_attrs=x", None),
        ];
        for (text, expected) in cases {
            assert_eq!(parse(text).ok().map(|dsn| dsn.target), expected, "{text}");
        }
    }

    #[test]
    fn parts_fill_in_what_a_dsn_does_not_say() {
        let parts = DsnParts {
            user: Some("other".into()),
            password: Some(Secret::new("it's")),
            sslrootcert: Some("/ca".into()),
            ..DsnParts::default()
        };
        let dsn = Dsn::parse("postgresql://me@db/app", &parts).unwrap();
        assert_eq!(dsn.rest, r"user='me' dbname='app' password='it\'s'");
        assert!(dsn.has_password);
        assert_eq!(dsn.tls.roots, Roots::File("/ca".into()));
        let dsn = Dsn::parse("postgresql://me:mine@db/app?sslrootcert=system", &parts).unwrap();
        assert_eq!(
            (dsn.rest.as_str(), dsn.tls.roots),
            ("user='me' password='mine' dbname='app'", Roots::System)
        );
    }

    #[test]
    fn what_cannot_be_used_is_named_with_what_to_do() {
        for (name, _) in UNSUPPORTED {
            let Err(why) = parse(&format!("host=db {name}=hunter2")) else { panic!("{name}") };
            assert!(why.contains(name) && !why.contains("hunter2"), "{why}");
        }
    }
}
