//! `nats.url`: one URL or several to servers and, if there is userinfo in them, a login.
//!
//! Pure, on the thread that loads the configuration. Scheme, host and port are checked by their looks; nothing is
//! looked up. What stands before an `@` is decoded and kept as a secret, and shown in no message.

use std::net::Ipv6Addr;

use super::faults::Faults;
use super::secrets::Secret;
use super::values::{quoted, texts};
use super::yaml::Node;

const NATS_URL_FORM: &str = "allowed: nats://host:4222 or tls://host:4222";

/// `nats.url`, taken apart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct NatsUrls {
    /// Without userinfo.
    pub(super) servers: Vec<String>,
    /// What stood before the `@`.
    pub(super) login: Option<UrlLogin>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum UrlLogin {
    UserPassword(String, Secret),
    Token(Secret),
}

/// One URL, several with commas between, or a list.
pub(super) fn nats_urls(node: &Node) -> Result<NatsUrls, Faults> {
    let mut servers = Vec::new();
    let mut logins = Vec::new();
    for (index, text) in texts(node)?.into_iter().enumerate() {
        for url in text.1.split(',') {
            // All of the text is shown, not the piece: a comma may stand within a password.
            let (server, login) = nats_url(url.trim())
                .map_err(|why| text.0.fault(index, format!("{} {why}; {NATS_URL_FORM}", quoted(text.1))))?;
            servers.push(server);
            logins.push(login);
        }
    }
    let login = logins.iter().flatten().next().cloned();
    if logins.iter().flatten().any(|other| Some(other) != login.as_ref()) {
        let why = "its servers have different credentials; allowed: the same for all, once is enough";
        return Err(Faults::from(why.to_owned()));
    }
    Ok(NatsUrls { servers, login })
}

fn nats_url(url: &str) -> Result<(String, Option<UrlLogin>), &'static str> {
    if url.is_empty() {
        return Err("has an empty URL");
    }
    let (scheme, rest) = url.split_once("://").ok_or("is not a URL")?;
    let scheme = scheme.to_ascii_lowercase();
    if scheme != "nats" && scheme != "tls" {
        return Err("has a scheme that is not nats or tls");
    }
    let rest = rest.strip_suffix('/').unwrap_or(rest);
    let (userinfo, address) = match rest.rsplit_once('@') {
        Some((userinfo, address)) => (Some(userinfo), address),
        None => (None, rest),
    };
    check_address(address)?;
    Ok((format!("{scheme}://{address}"), userinfo.map(login).transpose()?))
}

/// Host and port, the port optional.
fn check_address(address: &str) -> Result<(), &'static str> {
    if address.contains(['/', '?', '#']) {
        return Err("has more than a host and a port");
    }
    let (host, port) = match address.strip_prefix('[').map(|rest| rest.split_once(']')) {
        Some(Some((host, port))) if host.parse::<Ipv6Addr>().is_ok() => (host, port.strip_prefix(':')),
        Some(_) => return Err("has no valid IPv6 address in its brackets"),
        None => match address.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (address, None),
        },
    };
    let of_name = |b: u8| b.is_ascii_alphanumeric() || b"-_.:".contains(&b);
    if host.is_empty() || !host.bytes().all(of_name) {
        return Err("has no valid host");
    }
    match port.map(str::parse::<u16>) {
        None => Ok(()),
        Some(Ok(port)) if port != 0 => Ok(()),
        Some(_) => Err("has a port that is not 1 to 65535"),
    }
}

fn login(userinfo: &str) -> Result<UrlLogin, &'static str> {
    let login = match userinfo.split_once(':') {
        Some((user, password)) => UrlLogin::UserPassword(decoded(user)?, Secret::new(decoded(password)?)),
        None => UrlLogin::Token(Secret::new(decoded(userinfo)?)),
    };
    match &login {
        UrlLogin::UserPassword(user, _) if user.is_empty() => Err("has no user before the password"),
        UrlLogin::Token(token) if token.expose().is_empty() => Err("has nothing before the @"),
        _ => Ok(login),
    }
}

/// Undoes the percent-encoding of RFC 3986.
fn decoded(text: &str) -> Result<String, &'static str> {
    const BAD: &str = "has a % in its credentials that does not begin an escape such as %40";
    let mut bytes = Vec::with_capacity(text.len());
    let mut pieces = text.split('%');
    bytes.extend_from_slice(pieces.next().unwrap_or_default().as_bytes());
    for piece in pieces {
        let hex = piece.get(..2).filter(|hex| hex.bytes().all(|b| b.is_ascii_hexdigit())).ok_or(BAD)?;
        bytes.push(u8::from_str_radix(hex, 16).map_err(|_| BAD)?);
        bytes.extend_from_slice(&piece.as_bytes()[2..]);
    }
    String::from_utf8(bytes).map_err(|_| BAD)
}
