//! Where a store's connections lead, and how each of them is made: which server, and in clear or over TLS.
//!
//! The servers are tried in turn until one takes us and is what is wanted. On each, `sslmode` says what is tried:
//! `allow` begins in clear, `prefer` begins with TLS if the server has it, and both try the other way when the first
//! fails before anybody was let in, as libpq does; from `require` on there is one way. So `prefer` keeps nobody out
//! who can change what we send: it is what is used when nobody said anything, not what to use across a network.
//! A password that goes to another machine in clear is worth one warning, the only line that is logged here.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use log::{debug, warn};
use postgres::config::SslMode as DriverMode;
use postgres::tls::{MakeTlsConnect, TlsConnect};
use postgres::{Client, Socket};
use r2d2::ManageConnection;
use r2d2_postgres::PostgresConnectionManager;
use tokio_postgres_rustls::MakeRustlsConnect;

use super::dsn::{Dsn, Server, SessionTarget, SslMode};
use super::{StoreError, application_name};
use crate::config::{DsnParts, Secret};
use crate::tls::{self, Tls};

/// A peer that vanished is noticed within 60 s when idle, 30 s with bytes on their way.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(30);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEPALIVE_RETRIES: u32 = 3;
const TCP_USER_TIMEOUT: Duration = Duration::from_secs(30);
/// What tokio-postgres takes for `keepalives_idle` when the DSN does not say.
const KEEPALIVE_IDLE_UNSET: Duration = Duration::from_secs(2 * 60 * 60);
/// `invalid_authorization_specification`: also the answer of a server whose pg_hba.conf wants TLS, or wants none.
const NOT_LET_IN: &str = "28000";

/// Where connections lead. Cheap to clone.
#[derive(Clone)]
pub(super) struct Target(Arc<Inner>);

struct Inner {
    dsn: Dsn,
    /// Everything but the server and the way.
    driver: postgres::Config,
    /// The warning was given.
    warned: AtomicBool,
}

/// How bytes go to a server: a way to connect.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Transport {
    Clear,
    TlsIfOffered,
    Tls,
}

/// What made a connection: it knows one server and one way to it, and is made anew for each try.
pub(super) type Maker = PostgresConnectionManager<Connector>;

/// A connection, with what made it.
pub(super) struct Made {
    pub(super) client: Client,
    pub(super) maker: Maker,
}

/// What became of one way to connect.
struct Tried {
    result: Result<Made, postgres::Error>,
    over_tls: bool,
}

impl Target {
    /// Reads a DSN, with what it does not say from `parts`, and adds the defaults. Reads the files that it names, to
    /// tell now what is wrong with them; each connection reads them again.
    ///
    /// # Errors
    /// The DSN or a file of it cannot be used. The message holds nothing secret.
    pub(super) fn new(
        dsn: &Secret,
        parts: &DsnParts,
        instance_id: &str,
        connect_timeout: Duration,
    ) -> Result<Target, StoreError> {
        let dsn = Dsn::parse(dsn.expose(), parts).map_err(StoreError::refused)?;
        // The driver's own words may quote a part of what it could not read.
        let unknown = || "the DSN has a value that its parameter does not take".to_owned();
        let mut driver: postgres::Config = dsn.rest.parse().map_err(|_| StoreError::refused(unknown()))?;
        if driver.get_application_name().is_none() {
            driver.application_name(&application_name(instance_id));
        }
        if driver.get_connect_timeout().is_none() {
            driver.connect_timeout(connect_timeout);
        }
        if driver.get_tcp_user_timeout().is_none() {
            driver.tcp_user_timeout(TCP_USER_TIMEOUT);
        }
        if driver.get_keepalives_idle() == KEEPALIVE_IDLE_UNSET {
            driver.keepalives_idle(KEEPALIVE_IDLE);
        }
        if driver.get_keepalives_interval().is_none() {
            driver.keepalives_interval(KEEPALIVE_INTERVAL);
        }
        if driver.get_keepalives_retries().is_none() {
            driver.keepalives_retries(KEEPALIVE_RETRIES);
        }
        driver.notice_callback(|notice| debug!("postgres says: {}: {}", notice.severity(), notice.message()));
        if dsn.target == SessionTarget::ReadWrite {
            driver.target_session_attrs(postgres::config::TargetSessionAttrs::ReadWrite);
        }
        let target = Target(Arc::new(Inner { dsn, driver, warned: AtomicBool::new(false) }));
        target.tls_is_possible()?;
        Ok(target)
    }

    /// Where the servers are, without user and password: `a:5432,b:5432`.
    pub(super) fn address(&self) -> String {
        self.0.dsn.address()
    }

    /// Makes a connection, to the first server that takes us and is what is wanted.
    ///
    /// # Errors
    /// What each server said.
    pub(super) fn connect(&self) -> Result<Made, StoreError> {
        let mut servers: Vec<&Server> = self.0.dsn.servers.iter().collect();
        if self.0.dsn.shuffled {
            fastrand::shuffle(&mut servers);
        }
        let mut failed: Vec<(&Server, StoreError)> = Vec::new();
        for server in servers {
            match self.connect_to(server) {
                Ok(made) => return Ok(made),
                Err(error) => failed.push((server, error)),
            }
        }
        match failed.pop() {
            Some((_, error)) if failed.is_empty() => Err(error),
            last => {
                failed.extend(last);
                let text = |(server, error): &(&Server, StoreError)| {
                    format!("{}:{}: {error}", server.host, server.port)
                };
                Err(StoreError {
                    text: failed.iter().map(text).collect::<Vec<_>>().join("; "),
                    sqlstate: None,
                    outage: failed.iter().any(|(_, error)| error.outage),
                })
            }
        }
    }

    /// Tries the ways to one server.
    fn connect_to(&self, server: &Server) -> Result<Made, StoreError> {
        let mode = if server.is_socket() { SslMode::Disable } else { self.0.dsn.mode };
        let mut first_failure: Option<String> = None;
        for &transport in transports(mode) {
            let tried = self.attempt(server, transport)?;
            self.warn_of_clear(server, &tried);
            let error = match tried.result {
                Ok(made) => return self.wanted(made),
                Err(error) => error,
            };
            let not_let_in = error.code().is_some_and(|code| code.code() == NOT_LET_IN);
            let tls_failed = tls::is_failure_of_tls(&error);
            let cause = StoreError::from(&error);
            match first_failure {
                None if not_let_in || tls_failed => first_failure = Some(cause.text),
                None => return Err(cause),
                Some(first) => {
                    return Err(StoreError { text: format!("{first}; tried otherwise: {cause}"), ..cause });
                }
            }
        }
        Err(StoreError::outage(first_failure.unwrap_or_default()))
    }

    fn attempt(&self, server: &Server, transport: Transport) -> Result<Tried, StoreError> {
        let mut driver = self.0.driver.clone();
        driver.host(&server.host).port(server.port);
        if let Some(address) = server.address {
            driver.hostaddr(address);
        }
        driver.ssl_mode(match transport {
            Transport::Clear => DriverMode::Disable,
            Transport::TlsIfOffered => DriverMode::Prefer,
            Transport::Tls => DriverMode::Require,
        });
        let rustls = if transport == Transport::Clear { None } else { Some(rustls(&self.0.dsn.tls)?) };
        let begun = Arc::new(AtomicBool::new(false));
        let maker = Maker::new(driver, Connector { rustls, begun: begun.clone() });
        let result = maker.connect().map(|client| Made { client, maker });
        Ok(Tried { result, over_tls: begun.load(Ordering::Relaxed) })
    }

    /// Makes sure that the server is what is wanted; what the driver cannot ask itself.
    fn wanted(&self, mut made: Made) -> Result<Made, StoreError> {
        if self.0.dsn.target == SessionTarget::Primary {
            // Prepares nothing: the other end may be a pooler.
            let row = made.client.query_typed_one("SELECT pg_catalog.pg_is_in_recovery()", &[]);
            if row.map_err(|error| StoreError::from(&error))?.get(0) {
                return Err(StoreError::outage("it is a standby".into()));
            }
        }
        Ok(made)
    }

    fn warn_of_clear(&self, server: &Server, tried: &Tried) {
        // A server that answered was told the password, or what can be guessed at it.
        let answered = tried.result.as_ref().map_or_else(|error| error.as_db_error().is_some(), |_| true);
        let dsn = &self.0.dsn;
        if tells_password(server, dsn.has_password, tried.over_tls)
            && answered
            && !self.0.warned.swap(true, Ordering::Relaxed)
        {
            warn!(
                "the password crosses the network without TLS: postgres={}:{}; set sslmode=verify-full and \
                 sslrootcert, or turn TLS on in the server",
                server.host, server.port
            );
        }
    }

    fn tls_is_possible(&self) -> Result<(), StoreError> {
        let dsn = &self.0.dsn;
        if dsn.mode == SslMode::Disable || dsn.servers.iter().all(Server::is_socket) {
            return Ok(());
        }
        rustls(&dsn.tls).map(|_| ())
    }
}

/// The ways that a mode tries, in their order.
fn transports(mode: SslMode) -> &'static [Transport] {
    match mode {
        SslMode::Disable => &[Transport::Clear],
        SslMode::Allow => &[Transport::Clear, Transport::Tls],
        SslMode::Prefer => &[Transport::TlsIfOffered, Transport::Clear],
        SslMode::Require | SslMode::VerifyCa | SslMode::VerifyFull => &[Transport::Tls],
    }
}

/// Whether logging in tells others on the network the password.
fn tells_password(server: &Server, has_password: bool, over_tls: bool) -> bool {
    has_password && !over_tls && !server.is_local()
}

fn rustls(tls: &Tls) -> Result<MakeRustlsConnect, StoreError> {
    let mut client = tls.client().map_err(StoreError::refused)?;
    // What servers from PostgreSQL 17 on want to hear when TLS comes first (sslnegotiation=direct).
    client.alpn_protocols = vec![b"postgresql".to_vec()];
    Ok(MakeRustlsConnect::new(client))
}

/// The adapter to rustls, `None` for a connection in clear, and whether a handshake was begun through it.
#[derive(Clone)]
pub(super) struct Connector {
    rustls: Option<MakeRustlsConnect>,
    begun: Arc<AtomicBool>,
}

/// A [`Connector`] for one server.
pub(super) struct Connecting {
    rustls: Option<<MakeRustlsConnect as MakeTlsConnect<Socket>>::TlsConnect>,
    begun: Arc<AtomicBool>,
}

impl MakeTlsConnect<Socket> for Connector {
    type Stream = <MakeRustlsConnect as MakeTlsConnect<Socket>>::Stream;
    type TlsConnect = Connecting;
    type Error = <MakeRustlsConnect as MakeTlsConnect<Socket>>::Error;

    fn make_tls_connect(&mut self, host: &str) -> Result<Connecting, Self::Error> {
        let make = |rustls: &mut MakeRustlsConnect| MakeTlsConnect::<Socket>::make_tls_connect(rustls, host);
        Ok(Connecting { rustls: self.rustls.as_mut().map(make).transpose()?, begun: self.begun.clone() })
    }
}

impl TlsConnect<Socket> for Connecting {
    type Stream = <Connector as MakeTlsConnect<Socket>>::Stream;
    type Error = std::io::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Stream, Self::Error>> + Send>>;

    fn connect(self, socket: Socket) -> Self::Future {
        match self.rustls {
            Some(rustls) => {
                self.begun.store(true, Ordering::Relaxed);
                Box::pin(rustls.connect(socket))
            }
            // The driver, told to use no TLS, never asks for it.
            None => Box::pin(async { Err(std::io::Error::other("TLS on a connection in clear")) }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(dsn: &str) -> Result<Target, StoreError> {
        Target::new(&Secret::new(dsn), &DsnParts::default(), "node-1", Duration::from_secs(5))
    }

    #[test]
    fn a_bad_dsn_never_shows_a_password() {
        for dsn in [
            "postgresql://user@db/app?hunter2=x",
            "postgresql://user:hunter2@db:hunter2/app",
            "postgresql://user:hunter2@[db/app",
            "postgresql://user:hunter2/x@db/app",
            "postgresql://user:hunter2%zz@db/app",
            "host=db password=hunter2 hunter2=1",
            "host=db password='hunter2",
            "host=db password='hunter2'x=y",
            "hunter2",
            "password=hunter2",
            "postgresql://user:hunter2@db/app?sslmode=hunter2",
            "postgresql://user:hunter2@db/app?keepalives=hunter2",
            "postgresql://user:hunter2@db/app?target_session_attrs=hunter2",
            "postgresql://user:hunter2@db/app?sslkey=/none&sslpassword=hunter2",
            "postgresql://user:hunter2@db/app?sslrootcert=/none/ca.pem",
        ] {
            let Err(error) = parse(dsn) else { panic!("{dsn}") };
            assert!(!error.to_string().contains("hunter2"), "{error}");
            assert!(!error.is_outage(), "{error}");
        }
    }

    #[test]
    fn the_dsn_has_the_last_word() {
        let config = parse("host=db user=u").unwrap().0.driver.clone();
        assert_eq!(config.get_application_name(), Some("pg-outbox/node-1"));
        assert_eq!(config.get_connect_timeout(), Some(&Duration::from_secs(5)));
        assert_eq!(config.get_keepalives_idle(), Duration::from_secs(30));
        assert_eq!(config.get_keepalives_interval(), Some(Duration::from_secs(10)));
        assert_eq!(config.get_keepalives_retries(), Some(3));
        assert_eq!(config.get_tcp_user_timeout(), Some(&Duration::from_secs(30)));

        let config = parse(
            "host=db user=u application_name=mine connect_timeout=9 keepalives_idle=8 keepalives_interval=7 \
             keepalives_retries=6 tcp_user_timeout=5",
        )
        .unwrap();
        let config = config.0.driver.clone();
        assert_eq!(config.get_application_name(), Some("mine"));
        assert_eq!(config.get_connect_timeout(), Some(&Duration::from_secs(9)));
        assert_eq!(config.get_keepalives_idle(), Duration::from_secs(8));
        assert_eq!(config.get_keepalives_interval(), Some(Duration::from_secs(7)));
        assert_eq!(config.get_keepalives_retries(), Some(6));
        assert_eq!(config.get_tcp_user_timeout(), Some(&Duration::from_secs(5)));
    }

    #[test]
    fn addresses_name_hosts_alone() {
        for (dsn, expected) in [
            ("postgresql://user:hunter2@db/app", "db:5432"),
            ("postgresql://user:hunter2@a:1,b:2/app", "a:1,b:2"),
            ("host=/run/postgresql user=u", "/run/postgresql:5432"),
        ] {
            assert_eq!(parse(dsn).unwrap().address(), expected);
        }
    }

    #[test]
    fn the_driver_is_told_what_the_dsn_said() {
        for dsn in [
            "postgresql://u%20ser:p%27a%5C%20ss%40@db/my%20app?options=-c%20geqo%3Doff",
            r"host=db user='u ser' password = 'p\'a\\ ss@' dbname=my\ app options='-c geqo=off'",
        ] {
            let config = parse(dsn).unwrap().0.driver.clone();
            assert_eq!(config.get_user(), Some("u ser"), "{dsn}");
            assert_eq!(config.get_password(), Some(r"p'a\ ss@".as_bytes()), "{dsn}");
            assert_eq!(config.get_dbname(), Some("my app"), "{dsn}");
            assert_eq!(config.get_options(), Some("-c geqo=off"), "{dsn}");
        }
    }

    #[test]
    fn a_password_is_told_to_others_without_tls_and_off_this_machine() {
        let server = |host: &str, address: Option<&str>| Server {
            host: host.into(),
            address: address.map(|text| text.parse().unwrap()),
            port: 5432,
        };
        let cases = [
            (server("db", None), true),
            (server("10.0.0.5", None), true),
            (server("localhost", None), false),
            (server("127.0.0.9", None), false),
            (server("::1", None), false),
            (server("/run/postgresql", None), false),
            (server("db", Some("127.0.0.1")), false),
            (server("localhost", Some("10.0.0.5")), true),
        ];
        for (server, told) in cases {
            assert_eq!(tells_password(&server, true, false), told, "{server:?}");
            assert!(!tells_password(&server, false, false) && !tells_password(&server, true, true));
        }
    }
}
