//! The private servers: they come back with their data, they can be paused, and nothing of them stays behind.

use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use pg_outbox::lab::sandbox::{NatsOptions, NatsServer, Stop, StoreState};
use postgres::{Client as Postgres, NoTls};
use serde_json::json;

use crate::harness::database::start_postgres;
use crate::harness::stream::current_nats_server;
use crate::harness::wire::Client;
use crate::harness::{TestStream, wait_until};

/// The working directory of a server: its folder.
fn folder_of(pid: u32) -> PathBuf {
    let folder = std::fs::read_link(format!("/proc/{pid}/cwd")).unwrap();
    // PostgreSQL's is the data folder in it.
    if folder.ends_with("data") { folder.parent().unwrap().to_owned() } else { folder }
}

fn gone(pid: u32) -> bool {
    !Path::new(&format!("/proc/{pid}")).exists()
}

#[test]
fn a_private_postgres_keeps_its_data_over_every_end_and_leaves_nothing() {
    let mut server = start_postgres();
    server.create_database("kept").unwrap();
    let dsn = server.dsn("kept");
    let connect = || Postgres::connect(&dsn, NoTls).unwrap();
    connect().batch_execute("CREATE TABLE numbers (n int)").unwrap();
    let ends: [&dyn Fn(&mut pg_outbox::lab::sandbox::PostgresServer); 3] = [
        &|server| server.stop(Stop::Fast).unwrap(),
        &|server| server.stop(Stop::Immediate).unwrap(),
        &|server| server.kill().unwrap(),
    ];
    for (n, end) in (1_i64..).zip(ends) {
        let mut open = connect();
        open.execute("INSERT INTO numbers VALUES ($1::int8)", &[&n]).unwrap();
        end(&mut server);
        assert_eq!(server.pid(), None);
        assert!(open.batch_execute("SELECT 1").is_err(), "connections end with the server");
        server.start_again().unwrap();
        let count: i64 = connect().query_one("SELECT count(*) FROM numbers", &[]).unwrap().get(0);
        assert_eq!(count, n);
    }
    let pid = server.pid().unwrap();
    let folder = folder_of(pid);
    assert!(folder.join("data/PG_VERSION").exists());
    server.pause().unwrap(); // a paused one must be able to end, too
    drop(server);
    assert!(gone(pid));
    assert!(!folder.exists());
}

#[test]
fn a_paused_postgres_answers_nobody_until_it_is_resumed() {
    let server = start_postgres();
    let mut client = Postgres::connect(&server.dsn("postgres"), NoTls).unwrap();
    server.pause().unwrap();
    let (answered, answer) = std::sync::mpsc::channel();
    let thread = std::thread::spawn(move || {
        client.batch_execute("SELECT 1").unwrap();
        answered.send(()).unwrap();
    });
    assert!(answer.recv_timeout(Duration::from_millis(500)).is_err(), "its children are paused, too");
    server.resume().unwrap();
    answer.recv_timeout(Duration::from_secs(10)).unwrap();
    thread.join().unwrap();
}

#[test]
fn a_private_nats_server_comes_back_on_its_port_with_or_without_its_store() {
    let mut server = NatsServer::start(&NatsOptions::default()).unwrap();
    let url = server.url();
    let stream = TestStream::on(&url, &json!({}));
    let publish = |text: &str| {
        let mut client = Client::connect(&url);
        client.publish(&stream.subject("a"), "", "", text.as_bytes());
        client.flush();
    };
    publish("1");
    server.stop(Stop::Fast).unwrap();
    assert!(TcpStream::connect(("127.0.0.1", server.port())).is_err());
    server.start_again(StoreState::Kept).unwrap();
    publish("2");
    server.kill().unwrap();
    server.start_again(StoreState::Kept).unwrap();
    assert_eq!(stream.messages().len(), 2);
    server.stop(Stop::Immediate).unwrap();
    server.start_again(StoreState::Emptied).unwrap();
    stream.create(&json!({}));
    assert_eq!(stream.count(), 0);

    server.pause().unwrap();
    let mut client = TcpStream::connect(("127.0.0.1", server.port())).unwrap();
    client.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
    assert!(std::io::Read::read(&mut client, &mut [0; 64]).is_err(), "a paused server greets nobody");
    server.resume().unwrap();
    wait_until("it answers again", Duration::from_secs(10), &[&server], || stream.count() == 0);

    let pid = server.pid().unwrap();
    let folder = folder_of(pid);
    drop(server);
    assert!(gone(pid));
    assert!(!folder.exists());
}

#[test]
fn further_config_reaches_nats_server() {
    let config = "max_payload: 2048\nauthorization { users: [
        { user: writer, password: w, permissions: { publish: { deny: [\"denied.>\"] } } } ] }";
    let server = NatsServer::start(&NatsOptions { program: None, config: config.to_owned() }).unwrap();
    let mut client = Client::connect(&server.url().replace("nats://", "nats://writer:w@"));
    client.publish("denied.x", "", "", b"");
    client.flush();
    assert!(
        client.errors[0].contains("Permissions Violation for Publish to \"denied.x\""),
        "{:?}",
        client.errors
    );
}

/// The server that publishes batches whole or not at all: the one of the distribution may be too old for that.
#[test]
fn a_current_nats_server_runs_beside_the_one_of_the_distribution() {
    let options = NatsOptions { program: Some(current_nats_server()), config: String::new() };
    let server = NatsServer::start(&options).unwrap();
    let stream = TestStream::on(&server.url(), &json!({"allow_atomic": true}));
    assert_eq!(stream.info()["config"]["allow_atomic"], true);
    let mut client = Client::connect(&server.url());
    client.publish(&stream.subject("a"), "", "NATS/1.0\r\nNats-Msg-Id: 1\r\n\r\n", b"{}");
    client.flush();
    assert_eq!(stream.messages()[0].msg_id, "1");
}

#[test]
fn an_end_while_starting_shows_the_log() {
    let options = NatsOptions { program: None, config: "no_such_option: 1\n".to_owned() };
    let error = NatsServer::start(&options).unwrap_err().to_string();
    assert!(error.contains("no_such_option"), "{error}");
}

#[test]
fn a_port_that_was_taken_meanwhile_is_an_error_at_once() {
    let mut server = NatsServer::start(&NatsOptions::default()).unwrap();
    server.stop(Stop::Fast).unwrap();
    let _thief = TcpListener::bind(("127.0.0.1", server.port())).unwrap();
    let started = Instant::now();
    let error = server.start_again(StoreState::Kept).unwrap_err().to_string();
    assert_eq!(error, format!("start nats-server: port {} was taken meanwhile", server.port()));
    assert!(started.elapsed() < Duration::from_secs(10));
}
