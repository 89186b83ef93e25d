//! The passwords that were planted in configurations, and the search for them in everything that the program prints.
//!
//! A config of a test plants each password and token that it sets, that of its DSN first of all. What the program
//! shows (log, stdout, answers over HTTP, command line) is searched for all of them, whoever planted them, at the
//! latest when a daemon's life ends. A find fails the test with the place, and the line, without the secret.

use std::collections::BTreeSet;
use std::process::Output;
use std::sync::{Mutex, PoisonError};

/// Shorter ones occur by chance.
const SHORTEST: usize = 7;

static PLANTED: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());

/// From now on nobody may print this.
pub fn plant(secret: &str) {
    if secret.len() >= SHORTEST {
        PLANTED.lock().unwrap_or_else(PoisonError::into_inner).insert(secret.to_owned());
    }
}

/// Plants what is secret in a value of the configuration: all of a password or token, the password in a URL.
pub fn plant_value(key: &str, value: &str) {
    let elsewhere = value.starts_with("file:") || value.starts_with("credential:");
    if ["password", "token"].contains(&key) && !elsewhere {
        plant(value);
    }
    for url in value.split(',') {
        let userinfo = url.split_once("://").and_then(|(_, rest)| rest.rsplit_once('@'));
        if let Some((userinfo, _)) = userinfo {
            plant(userinfo.split_once(':').map_or(userinfo, |(_, password)| password));
        }
    }
}

/// Where `text`, which came from `place`, shows a planted secret: its line with stars in place of the secret.
pub fn shown_in(place: &str, text: &str) -> Option<String> {
    let planted = PLANTED.lock().unwrap_or_else(PoisonError::into_inner);
    let secret = planted.iter().find(|secret| text.contains(secret.as_str()))?;
    let (index, line) = text.lines().enumerate().find(|(_, line)| line.contains(secret.as_str()))?;
    Some(format!(
        "{place}, line {}, shows a planted secret: {}",
        index + 1,
        line.replace(secret.as_str(), "***")
    ))
}

/// The same for both outputs of a command that has ended.
#[track_caller]
pub fn assert_none_printed(output: &Output) {
    assert_none_in("stdout of a command", &String::from_utf8_lossy(&output.stdout));
    assert_none_in("stderr of a command", &String::from_utf8_lossy(&output.stderr));
}

/// Fails the test if `text`, which came from `place`, shows a planted secret.
#[track_caller]
pub fn assert_none_in(place: &str, text: &str) {
    if let Some(found) = shown_in(place, text) {
        panic!("{found}");
    }
}
