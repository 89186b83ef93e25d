//! Three nats-servers with JetStream that form a cluster on loopback.

use std::time::Duration;

use pg_outbox::lab::sandbox::{NatsOptions, NatsServer, StoreState, free_port};
use serde_json::{Value, json};

use super::stream::current_nats_server;
use super::wire::Client;
use super::{Evidence, TestStream, wait_until};

/// Longest wait for the cluster, or a stream in it, to have a leader.
const LEADER_LIMIT: Duration = Duration::from_secs(120);

/// The cluster.
pub struct Cluster {
    /// Its servers.
    pub servers: Vec<NatsServer>,
}

impl Cluster {
    /// Starts three servers of the current version. They are a cluster once they have found each other.
    pub fn start() -> Cluster {
        let ports: Vec<u16> = (0..3).map(|_| free_port().unwrap()).collect();
        let routes: Vec<String> = ports.iter().map(|port| format!("nats://127.0.0.1:{port}")).collect();
        let servers = ports.iter().map(|port| {
            let config = format!(
                "cluster {{ name: harness, listen: \"127.0.0.1:{port}\", routes: [{}] }}",
                routes.join(", ")
            );
            let options = NatsOptions { program: Some(current_nats_server()), config };
            NatsServer::start(&options).unwrap_or_else(|error| panic!("{error:#}"))
        });
        Cluster { servers: servers.collect() }
    }

    /// The URLs of all servers, with commas between.
    pub fn urls(&self) -> String {
        self.servers.iter().map(NatsServer::url).collect::<Vec<_>>().join(",")
    }

    /// A stream with three replicas; `settings` override the fields of its configuration.
    pub fn stream(&self, settings: &Value) -> TestStream {
        let stream = TestStream::named(&self.urls());
        let mut settings = settings.clone();
        settings["num_replicas"] = json!(3);
        let witnesses: Vec<&dyn Evidence> =
            self.servers.iter().map(|server| server as &dyn Evidence).collect();
        wait_until("the cluster makes a stream", LEADER_LIMIT, &witnesses, || {
            stream.try_create(&settings).is_some()
        });
        self.wait_whole(&stream);
        stream
    }

    /// The server that leads the stream, if one does.
    pub fn leader(&self, stream: &TestStream) -> Option<usize> {
        let info = self.info(stream)?;
        let leader = info["cluster"]["leader"].as_str()?.to_owned();
        self.servers.iter().position(|server| leader == format!("sandbox-{}", server.port()))
    }

    /// Waits until the stream has a leader and both its followers are up to date.
    pub fn wait_whole(&self, stream: &TestStream) {
        let witnesses: Vec<&dyn Evidence> =
            self.servers.iter().map(|server| server as &dyn Evidence).collect();
        wait_until("every replica is current", LEADER_LIMIT, &witnesses, || {
            self.info(stream).is_some_and(|info| {
                let replicas = info["cluster"]["replicas"].as_array().cloned().unwrap_or_default();
                replicas.len() == 2 && replicas.iter().all(|replica| replica["current"] == true)
            })
        });
    }

    /// Kills a server.
    pub fn kill(&mut self, server: usize) {
        self.servers[server].kill().unwrap();
    }

    /// Starts it again with what it had stored.
    pub fn start_again(&mut self, server: usize) {
        self.servers[server].start_again(StoreState::Kept).unwrap();
    }

    /// What STREAM.INFO says, if the cluster says anything.
    fn info(&self, stream: &TestStream) -> Option<Value> {
        let mut client = Client::try_connect(&self.urls())?;
        client.try_api(&format!("STREAM.INFO.{}", stream.name), &Value::Null)
    }
}
