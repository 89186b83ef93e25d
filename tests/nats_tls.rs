//! NATS as a production network has it: TLS with its certificates, every way to log in, a slow network under TLS, and
//! the least permissions.
//!
//! Each test has servers of its own, with certificates from a CA of the test. Where a stream is read back, the server
//! takes connections in clear as well, for the harness alone: the daemon's settings insist on TLS.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Output;
use std::time::Duration;

use data_encoding::BASE64URL_NOPAD;
use nkeys::KeyPair;
use pg_outbox::lab::sandbox::{NatsOptions, NatsServer};
use serde_json::{Value, json};

use crate::harness::certificates::{Authority, Issued};
use crate::harness::daemon::pg_outbox;
use crate::harness::proxy::{Flow, Proxy, Way};
use crate::harness::stream::current_nats_server;
use crate::harness::{Config, Daemon, TestDb, TestStream, database, secrets, start_nats, stream, wait_until};

const LIMIT: Duration = Duration::from_secs(60);
const PASSWORD: &str = "pa55word of nats";

/// The `tls` section of a server with this certificate; `more` is added to it.
fn tls(issued: &Issued, more: &str) -> String {
    let (certificate, key) = (issued.certificate.display(), issued.key.display());
    format!("tls {{ cert_file: '{certificate}', key_file: '{key}', timeout: 10, {more} }}\n")
}

/// What `check` says of core NATS with this config.
fn check(config: &Config) -> Output {
    let config = config.clone().set("nats.jetstream.enabled", false).set("nats.max_retries", 1);
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), config.yaml()).unwrap();
    pg_outbox().arg("check").arg("--config").arg(file.path()).output().unwrap()
}

/// That `check` gets to NATS, or that it says `Err(...)`.
#[track_caller]
fn assert_comes(what: &str, config: &Config, expected: Result<(), &str>) {
    let output = check(config);
    let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    match expected {
        Ok(()) => assert!(output.status.success(), "{what}: {said}"),
        Err(part) => {
            assert!(!output.status.success(), "{what}: came, instead of: {part}\n{said}");
            assert!(said.contains(part), "{what}: no {part:?} in: {said}");
        }
    }
}

fn config(db: &TestDb, url: &str) -> Config {
    Config::new(db, &TestStream::named(url))
}

fn file(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn a_server_is_known_by_its_certificate() {
    let (ours, other) = (Authority::new(), Authority::new());
    let db = database();
    let right = |config: Config| config.set("nats.tls.ca", file(&ours.file()));
    for program in [None, Some(current_nats_server())] {
        let start =
            |config: String| NatsServer::start(&NatsOptions { program: program.clone(), config }).unwrap();
        let server = start(tls(&ours.issue(&["localhost"]), ""));
        let at = |host: &str| config(&db, &format!("{host}:{}", server.port()));
        let unknown = Err("UnknownIssuer");
        assert_comes("right", &right(at("tls://localhost")), Ok(()));
        assert_comes("the server insists", &right(at("nats://localhost")), Ok(()));
        let wrong = at("tls://localhost").set("nats.tls.ca", file(&other.file()));
        assert_comes("wrong CA", &wrong, unknown);
        assert_comes("the system's CAs", &at("tls://localhost"), unknown);
        assert_comes("the system's CAs, the server insists", &at("nats://localhost"), unknown);
        assert_comes("wrong name", &right(at("tls://127.0.0.1")), Err("not valid for name"));
        assert_comes(
            "no CA",
            &at("tls://localhost").set("nats.tls.ca", "/nowhere/ca.pem"),
            Err("/nowhere/ca.pem"),
        );
        let two = format!(
            "tls://localhost:{},tls://localhost:{}",
            pg_outbox::lab::sandbox::free_port().unwrap(),
            server.port()
        );
        assert_comes("the second of two", &right(config(&db, &two)), Ok(()));

        let expired = start(tls(&ours.issue_expired(&["localhost"]), ""));
        let config = right(config(&db, &format!("tls://localhost:{}", expired.port())));
        assert_comes("expired", &config, Err("certificate expired"));
    }
}

#[test]
fn a_server_that_wants_a_certificate_gets_ours() {
    let (ours, other) = (Authority::new(), Authority::new());
    let db = database();
    let verify = format!("verify: true, ca_file: '{}'", ours.file().display());
    for program in [None, Some(current_nats_server())] {
        let config = tls(&ours.issue(&["localhost"]), &verify);
        let server = NatsServer::start(&NatsOptions { program, config }).unwrap();
        let base = self::config(&db, &format!("tls://localhost:{}", server.port()))
            .set("nats.tls.ca", file(&ours.file()));
        let with = |issued: &Issued| {
            base.clone()
                .set("nats.tls.cert", file(&issued.certificate))
                .set("nats.tls.key", file(&issued.key))
        };
        assert_comes("ours", &with(&ours.issue(&["outbox"])), Ok(()));
        assert_comes("none", &base, Err("received fatal alert: "));
        assert_comes("a stranger's", &with(&other.issue(&["outbox"])), Err("received fatal alert: "));
        let mixed = Issued { certificate: ours.issue(&["a"]).certificate, key: ours.issue(&["b"]).key };
        assert_comes("mixed", &with(&mixed), Err("cannot be used together"));
    }
}

#[test]
fn tls_that_is_wanted_is_never_given_up() {
    let ours = Authority::new();
    let db = database();
    let plain = start_nats("");
    let port = plain.port();
    let says = Err("the server offers no TLS");
    assert_comes("tls://", &config(&db, &format!("tls://localhost:{port}")), says);
    let with_ca = config(&db, &format!("nats://localhost:{port}")).set("nats.tls.ca", file(&ours.file()));
    assert_comes("nats.tls.ca", &with_ca, says);
}

/// A signed claim, as nats-server reads it.
fn jwt(issuer: &KeyPair, subject: &KeyPair, nats: &Value) -> String {
    let encode = |value: &Value| BASE64URL_NOPAD.encode(value.to_string().as_bytes());
    let claims = json!({"jti": "x", "iat": 1_700_000_000, "iss": issuer.public_key(), "sub": subject.public_key(),
        "name": "test", "nats": nats});
    let text = format!("{}.{}", encode(&json!({"typ": "JWT", "alg": "ed25519-nkey"})), encode(&claims));
    format!("{text}.{}", BASE64URL_NOPAD.encode(&issuer.sign(text.as_bytes()).unwrap()))
}

/// The text of a `.creds` file, and the config of a server that knows its user.
fn operator_mode() -> (String, String) {
    let (operator, account, system, user) =
        (KeyPair::new_operator(), KeyPair::new_account(), KeyPair::new_account(), KeyPair::new_user());
    let account_claims = json!({"type": "account", "version": 2, "limits": {"subs": -1, "data": -1, "payload": -1,
        "imports": -1, "exports": -1, "wildcards": true, "conn": -1, "leaf": -1},
        "default_permissions": {"pub": {}, "sub": {}}});
    let user_claims =
        json!({"type": "user", "version": 2, "pub": {}, "sub": {}, "subs": -1, "data": -1, "payload": -1});
    let server = format!(
        "operator: '{}'\nsystem_account: {}\nresolver: MEMORY\nresolver_preload {{ {}: '{}', {}: '{}' }}\n",
        jwt(&operator, &operator, &json!({"type": "operator", "version": 2})),
        system.public_key(),
        account.public_key(),
        jwt(&operator, &account, &account_claims),
        system.public_key(),
        jwt(&operator, &system, &account_claims),
    );
    let (jwt, seed) = (jwt(&account, &user, &user_claims), user.seed().unwrap());
    secrets::plant(&jwt);
    secrets::plant(&seed);
    let creds = format!(
        "-----BEGIN NATS USER JWT-----\n{jwt}\n------END NATS USER JWT------\n\n\
         -----BEGIN USER NKEY SEED-----\n{seed}\n------END USER NKEY SEED------\n"
    );
    (creds, server)
}

/// Keys below `nats`, with their values.
type Keys<'a> = &'a [(&'a str, &'a str)];

#[test]
fn each_way_to_log_in_works_in_clear_and_over_tls() {
    let ours = Authority::new();
    let db = database();
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| {
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let (known, stranger) = (KeyPair::new_user(), KeyPair::new_user());
    let [seed, strange_seed] = [&known, &stranger].map(|pair| pair.seed().unwrap());
    secrets::plant(&seed);
    secrets::plant(&strange_seed);
    let (creds, operator) = operator_mode();
    let (strange_creds, _) = operator_mode();
    let password_file = format!("file:{}", write("password", &format!("{PASSWORD}\n")));
    secrets::plant(PASSWORD);
    let user = format!("authorization {{ user: outbox, password: '{PASSWORD}' }}\n");
    let token = format!("authorization {{ token: '{PASSWORD}' }}\n");
    let nkey = format!("authorization {{ users = [ {{ nkey: {} }} ] }}\n", known.public_key());
    let strange_nkey = write("strange.nk", &strange_seed);
    let strange_creds = write("strange.creds", &strange_creds);
    let (nkey_file, creds_file) = (write("seed.nk", &seed), write("user.creds", &creds));
    // The server's config, the right login, a wrong one.
    let ways: [(&str, Keys<'_>, Keys<'_>); 4] = [
        (
            &user,
            &[("user", "outbox"), ("password", &password_file)],
            &[("user", "outbox"), ("password", "wrong pass")],
        ),
        (&token, &[("token", &password_file)], &[("token", "a wrong token")]),
        (&nkey, &[("nkey_file", &nkey_file)], &[("nkey_file", &strange_nkey)]),
        (&operator, &[("credentials_file", &creds_file)], &[("credentials_file", &strange_creds)]),
    ];
    for (server, right, wrong) in ways {
        let server =
            start_nats(&format!("{server}{}allow_non_tls: true", tls(&ours.issue(&["localhost"]), "")));
        let plain = config(&db, &server.url());
        let over_tls =
            config(&db, &format!("tls://localhost:{}", server.port())).set("nats.tls.ca", file(&ours.file()));
        let with = |config: &Config, login: &[(&str, &str)]| {
            login
                .iter()
                .fold(config.clone(), |config, (key, value)| config.set(&format!("nats.{key}"), *value))
        };
        for base in [&plain, &over_tls] {
            let what = right[0].0;
            assert_comes(what, &with(base, right), Ok(()));
            assert_comes(what, &with(base, wrong), Err("Authorization Violation"));
            assert_comes(what, base, Err("Authorization Violation"));
        }
    }
}

/// A server with a certificate for `localhost`, a stream that the harness reaches in clear, and a way to it that may
/// be slow.
struct Server {
    ours: Authority,
    nats: NatsServer,
    stream: TestStream,
    proxy: Proxy,
}

fn server_behind_a_proxy() -> Server {
    let ours = Authority::new();
    let nats = start_nats(&format!("{}allow_non_tls: true", tls(&ours.issue(&["localhost"]), "")));
    let stream = TestStream::on(&nats.url(), &json!({}));
    let proxy = Proxy::to(nats.port());
    Server { ours, nats, stream, proxy }
}

impl Server {
    fn config(&self, db: &TestDb) -> Config {
        Config::new(db, &self.stream)
            .set("nats.url", format!("tls://localhost:{}", self.proxy.port()))
            .set("nats.tls.ca", file(&self.ours.file()))
    }
}

#[test]
fn large_messages_pass_a_slow_network_whole() {
    let db = database();
    let server = server_behind_a_proxy();
    // 1 MB each, 16 keys: more is on its way than any socket's buffer holds.
    db.client()
        .batch_execute(
            "INSERT INTO outboxes (topic, metadata, payload)
             SELECT 'order.placed', jsonb_build_object('ordering-key', n % 16),
                    to_jsonb(n || (SELECT string_agg(md5(n || ' ' || m), '') FROM generate_series(1, 31000) m))
             FROM generate_series(1, 24) n",
        )
        .unwrap();
    server.proxy.set(Way::ToServer, Flow::Slow(Duration::from_millis(1)));
    let config = server.config(&db).set("nats.ack_timeout", "60s").set("dispatcher.claim_budget", "60s");
    let daemon = Daemon::start(&config);
    wait_until("all are published", LIMIT, &[&daemon, &db, &server.stream], || db.pending() == 0);
    assert_eq!(daemon.log_lines("outage begins"), [""; 0]);
    assert_eq!(db.number("SELECT count(*) FROM outboxes WHERE attempts <> 1"), 0);
    let messages = server.stream.messages();
    let rows = db.client().query("SELECT id::text, payload::text FROM outboxes", &[]).unwrap();
    assert_eq!((messages.len(), rows.len()), (24, 24));
    for row in rows {
        let (id, payload): (String, String) = (row.get(0), row.get(1));
        let message = messages.iter().find(|message| message.msg_id == id).unwrap();
        assert!(message.payload == payload.as_bytes(), "event {id} arrived changed");
    }
}

#[test]
fn nothing_is_lost_when_a_connection_over_tls_breaks_or_stands_still() {
    let db = database();
    let server = server_behind_a_proxy();
    let config = server.config(&db).set("nats.ack_timeout", "1s").set("nats.connect_timeout", "1s");
    let daemon = Daemon::start(&config);
    daemon.wait_ready();
    assert_eq!(daemon.log_lines("TLS to nats: TLSv1_3").len(), 1, "{}", daemon.log());
    for break_it in [true, false] {
        let before = db.published();
        server.proxy.set(Way::ToServer, Flow::Slow(Duration::from_millis(5)));
        db.events("order.placed", 1500, 40);
        wait_until("some are published", LIMIT, &[&daemon, &db], || db.published() > before);
        if break_it {
            server.proxy.reset();
        } else {
            server.proxy.set_both(Flow::Cut);
        }
        wait_until("that is an outage", LIMIT, &[&daemon], || daemon.get("/ready").0 == 503);
        server.proxy.set_both(Flow::Free);
        wait_until("all are published", LIMIT, &[&daemon, &db, &server.stream], || db.pending() == 0);
    }
    let messages = server.stream.messages();
    assert_eq!(messages.len(), 3000);
    let ids: std::collections::BTreeSet<&str> =
        messages.iter().map(|message| message.msg_id.as_str()).collect();
    assert_eq!(ids.len(), 3000);
    let mut last = std::collections::BTreeMap::new();
    for message in &messages {
        let seq: i64 = message.header("Outbox-Seq").unwrap().parse().unwrap();
        let before = last.insert(message.header("ordering-key").unwrap().to_owned(), seq);
        assert!(before.is_none_or(|before| before < seq), "{seq} came after {before:?}");
    }
    // A link that was given up takes its tunnel with it.
    let tunnels = || {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", daemon.pid())).unwrap();
        let name =
            |task: std::fs::DirEntry| std::fs::read_to_string(task.path().join("comm")).unwrap_or_default();
        tasks
            .flatten()
            .filter(|task| task.path().exists())
            .map(name)
            .filter(|name| name.trim() == "nats-tls")
            .count()
    };
    wait_until("one tunnel is left", LIMIT, &[&daemon], || tunnels() == 1);
    drop(server.nats);
}

#[test]
fn a_password_in_clear_is_worth_one_warning_off_this_machine() {
    secrets::plant(PASSWORD);
    let db = database();
    let server = start_nats(&format!("authorization {{ user: outbox, password: '{PASSWORD}' }}\n"));
    // A name that is none of those known for this machine, and leads to it all the same.
    for (host, warnings) in [("127.1", 1), ("127.0.0.1", 0)] {
        let address = format!("nats://{host}:{}", server.port());
        let config = config(&db, &address)
            .set("nats.user", "outbox")
            .set("nats.password", PASSWORD)
            .set("nats.jetstream.enabled", false);
        let daemon = Daemon::start(&config);
        daemon.wait_ready();
        let lines = daemon.log_lines("crosses the network without TLS");
        assert_eq!(lines.len(), warnings, "{lines:?}");
        assert!(lines.iter().all(|line| line.contains("WARN") && line.contains(&address)), "{lines:?}");
    }
}

/// A server with the permissions that are shipped, but for the subject whose line has `without` in it.
fn permitted(without: Option<&str>) -> NatsServer {
    let shipped = concat!(env!("CARGO_MANIFEST_DIR"), "/etc/nats-permissions.conf");
    let text = std::fs::read_to_string(shipped).unwrap();
    let is_without = |line: &str| without.is_some_and(|part| line.contains(part));
    // An empty list would allow everything.
    let lines: Vec<&str> =
        text.lines().map(|line| if is_without(line) { "\"nothing.of.ours\"" } else { line }).collect();
    assert_eq!(text.lines().filter(|line| is_without(line)).count(), usize::from(without.is_some()));
    start_nats(&format!(
        "{}\nauthorization {{ users = [
            {{ user: admin, password: admin }}
            {{ user: outbox, password: '{PASSWORD}', permissions: $pg_outbox_permissions }} ] }}",
        lines.join("\n")
    ))
}

/// The configuration that the permissions are for, on a server that has them.
fn permitted_config(db: &TestDb, server: &NatsServer) -> (TestStream, Config) {
    secrets::plant(PASSWORD);
    let admin = server.url().replace("nats://", "nats://admin:admin@");
    let stream = TestStream { url: admin, name: "EVENTS".to_owned(), prefix: "app".to_owned() };
    stream.create(&json!({}));
    let config = Config::new(db, &stream)
        .set("nats.url", server.url())
        .set("nats.user", "outbox")
        .set("nats.password", PASSWORD)
        .set("nats.inbox_prefix", "_INBOX_outbox")
        .set("nats.ack_timeout", "1s")
        .set("nats.connect_timeout", "1s");
    (stream, config)
}

#[test]
fn the_permissions_that_are_shipped_are_enough() {
    let db = database();
    let server = permitted(None);
    let (stream, config) = permitted_config(&db, &server);
    let daemon = Daemon::start(&config.set_in("nats.topic_map", "evil.>", "other.>"));
    daemon.wait_ready();
    db.events("order.placed", 500, 20);
    let denied = db.event("evil.thing", "bad", "{}");
    wait_until("all others are published", LIMIT, &[&daemon, &db, &server], || db.published() == 500);
    assert_eq!(stream.count(), 500);
    let refused = format!(
        "SELECT count(*) FROM outboxes WHERE seq = {denied} AND last_error LIKE '%permission denied%'"
    );
    wait_until("the one that is not allowed is refused", LIMIT, &[&daemon, &db], || db.number(&refused) == 1);
    assert_eq!(daemon.log_lines("outage begins"), [""; 0]);
    assert_eq!(daemon.log_lines("connected: nats=").len(), 1);
    assert_eq!(server.log().matches("Violation").count(), server.log().matches("other.thing").count());
}

#[test]
fn a_subject_is_denied_though_the_password_is_part_of_it() {
    let db = database();
    let server = start_nats(
        r#"authorization { users = [ { user: outbox, password: secret, permissions: { publish: { deny: "app.secret.>" } } } ] }"#,
    );
    let url = server.url().replace("nats://", "nats://outbox:secret@");
    let stream = TestStream { url, name: "EVENTS".to_owned(), prefix: "app".to_owned() };
    stream.create(&json!({}));
    let config = Config::new(&db, &stream)
        .set("nats.url", server.url())
        .set("nats.user", "outbox")
        .set("nats.password", "secret");
    let daemon = Daemon::start(&config);
    db.event("secret.thing", "k", "{}");
    let refused = "SELECT count(*) FROM outboxes
                    WHERE last_error LIKE '%permission denied to publish to app.secret.thing%'";
    wait_until("it is refused", LIMIT, &[&daemon, &db, &server], || db.number(refused) == 1);
    assert_eq!(daemon.log_lines("outage begins"), [""; 0], "it alone is to blame");
}

#[test]
fn the_permissions_that_are_shipped_are_the_least() {
    let cases = [
        (
            "a message to itself",
            "our own inbox stays silent: allow this user to subscribe to and publish on _INBOX_outbox.>",
        ),
        ("# acks", "our own inbox stays silent"),
        ("is the stream there", "permission denied to publish to $JS.API.STREAM.INFO.EVENTS"),
    ];
    for (without, cause) in cases {
        let db = database();
        let server = permitted(Some(without));
        let (_, config) = permitted_config(&db, &server);
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), config.yaml()).unwrap();
        let output = pg_outbox().arg("check").arg("--config").arg(file.path()).output().unwrap();
        let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        assert!(!output.status.success() && said.contains(cause), "without {without}: {said}");
    }
    let db = database();
    let server = permitted(Some("the subjects that topics become"));
    let (_, config) = permitted_config(&db, &server);
    let daemon = Daemon::start(&config);
    db.event("order.placed", "k", "{}");
    let refused = "SELECT count(*) FROM outboxes WHERE last_error LIKE '%permission denied to publish to app.order.placed%'";
    wait_until("it is refused", LIMIT, &[&daemon, &db, &server], || db.number(refused) == 1);
}

#[test]
fn a_topic_does_not_lead_to_our_own_inbox() {
    let (db, stream) = (database(), stream());
    let config = Config::new(&db, &stream).set("nats.inbox_prefix", "replies.outbox").set_in(
        "nats.topic_map",
        "evil.>",
        "replies.>",
    );
    let daemon = Daemon::start(&config);
    db.event("evil.outbox.x.0.p1", "k", "{}");
    let dead = "SELECT count(*) FROM outboxes WHERE dead_at IS NOT NULL AND last_error LIKE '%reserved%'";
    wait_until("it is dead at once", LIMIT, &[&daemon, &db], || db.number(dead) == 1);
}
