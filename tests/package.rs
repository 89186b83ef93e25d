//! The Debian package: built, installed into a root of its own by dpkg with its maintainer scripts, started the
//! way systemd would, upgraded and purged.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::time::Duration;

use super::delivery::wait_drained;
use super::harness::daemon::pg_outbox;
use super::harness::{Config, Daemon, NotifySocket, database, stream};

const LIMIT: Duration = Duration::from_secs(60);
const SOURCE: &str = env!("CARGO_MANIFEST_DIR");

/// Runs a command to its end; it must succeed.
#[track_caller]
fn output(command: &mut Command) -> String {
    let output = command.stdin(Stdio::null()).output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
    assert!(output.status.success(), "{command:?}: {}{}", text(&output.stdout), text(&output.stderr));
    text(&output.stdout)
}

/// The package of the built program, made once.
fn package() -> &'static Path {
    static PACKAGE: OnceLock<PathBuf> = OnceLock::new();
    PACKAGE.get_or_init(|| {
        let out = Path::new(env!("CARGO_TARGET_TMPDIR")).join("package");
        let script = Path::new(SOURCE).join("etc/package.sh");
        let mut build = Command::new(script);
        build.args(["--binary", env!("CARGO_BIN_EXE_pg-outbox"), "--out"]).arg(&out);
        PathBuf::from(output(&mut build).trim_end())
    })
}

/// A file system of its own: nothing in it but dpkg's knowledge of what this machine has installed.
struct Root(tempfile::TempDir);

impl Root {
    fn new() -> Root {
        let folder = tempfile::tempdir().unwrap();
        // The service's user goes through it to its program.
        fs::set_permissions(folder.path(), PermissionsExt::from_mode(0o755)).unwrap();
        let dpkg = folder.path().join("var/lib/dpkg");
        for name in ["info", "updates", "triggers", "parts"] {
            fs::create_dir_all(dpkg.join(name)).unwrap();
        }
        fs::create_dir_all(folder.path().join("etc")).unwrap();
        // So that what the package depends on is judged by what there is.
        fs::copy("/var/lib/dpkg/status", dpkg.join("status")).unwrap();
        Root(folder)
    }

    /// The path of a file in it.
    fn path(&self, absolute: &str) -> PathBuf {
        self.0.path().join(absolute.trim_start_matches('/'))
    }

    /// Runs dpkg over it, then `more`, as root or as who takes himself for it.
    #[track_caller]
    fn dpkg(&self, arguments: &[&str], more: &str) -> String {
        let mut command = Command::new(if is_root() { "sh" } else { "fakeroot" });
        if !is_root() {
            command.arg("sh");
        }
        let script = format!(
            "dpkg --root=\"$0\" --log=\"$0/dpkg.log\" --force-unsafe-io --force-script-chrootless \"$@\" >&2; cd \"$0\"; {more}"
        );
        output(command.args(["-ec", &script]).arg(self.0.path()).args(arguments))
    }

    /// Installs the package, or another one over it, and returns rights, owner and group of the named files.
    #[track_caller]
    fn install(&self, files: &str) -> Vec<String> {
        let rights = format!("stat -c '%n %a %u %g' {files}");
        let package = package().to_str().unwrap();
        self.dpkg(&["--install", package], &rights).lines().map(str::to_owned).collect()
    }

    /// The number of user and group `pg-outbox`.
    fn service_ids(&self) -> (u32, u32) {
        let passwd = fs::read_to_string(self.path("/etc/passwd")).unwrap();
        let entry: Vec<&str> =
            passwd.lines().find(|line| line.starts_with("pg-outbox:")).unwrap().split(':').collect();
        assert!(entry[6].ends_with("/nologin"), "{entry:?}");
        (entry[2].parse().unwrap(), entry[3].parse().unwrap())
    }

    /// The settings of an installed unit, the values of each in their order.
    fn unit(&self, name: &str) -> HashMap<String, Vec<String>> {
        let text = fs::read_to_string(self.path("/usr/lib/systemd/system").join(name)).unwrap();
        let mut settings: HashMap<String, Vec<String>> = HashMap::new();
        for (key, value) in
            text.lines().filter(|line| !line.starts_with('#')).filter_map(|line| line.split_once('='))
        {
            settings.entry(key.to_owned()).or_default().push(value.to_owned());
        }
        settings
    }

    /// A command line of a unit, with its files in this root.
    fn command(&self, line: &str) -> Command {
        let inside = |word: &str| if word.starts_with('/') { self.path(word) } else { PathBuf::from(word) };
        let mut words = line.split(' ');
        let mut command = Command::new(inside(words.next().unwrap()));
        command.args(words.map(inside));
        command
    }

    /// Starts the unit as systemd would: its user, its credentials, nothing of our environment, a socket to
    /// speak to.
    fn start(&self, unit: &HashMap<String, Vec<String>>, systemd: &NotifySocket) -> Daemon {
        let credentials = self.path("/run/credentials/pg-outbox.service");
        fs::create_dir_all(&credentials).unwrap();
        let (user, group) = self.service_ids();
        for credential in &unit["LoadCredential"] {
            let (name, source) = credential.split_once(':').unwrap();
            // What is not there is left out, as systemd does for names without a path.
            if let Ok(secret) = fs::read(self.path("/etc/credstore").join(source)) {
                let target = credentials.join(name);
                fs::write(&target, secret).unwrap();
                fs::set_permissions(&target, PermissionsExt::from_mode(0o400)).unwrap();
                if is_root() {
                    chown(&target, Some(user), Some(group)).unwrap();
                }
            }
        }
        let mut command = self.command(&unit["ExecStart"][0]);
        command.env_clear().env("CREDENTIALS_DIRECTORY", &credentials).current_dir("/").stdin(Stdio::null());
        systemd.attach(&mut command, LIMIT);
        if is_root() {
            command.uid(user).gid(group);
        }
        let mut daemon = Daemon::run(command);
        assert_eq!(systemd.wait("of the start", &daemon, |_| true), "READY=1");
        daemon.wait_listening();
        daemon.wait_ready();
        daemon
    }
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// `systemctl stop`.
fn stop(mut daemon: Daemon, systemd: &NotifySocket) {
    daemon.term();
    systemd.wait("of the stop", &daemon, |message| message == "STOPPING=1");
    assert_eq!(daemon.wait_exit(LIMIT).code(), Some(0));
}

#[test]
fn an_installed_package_runs_reloads_and_restarts() {
    let root = Root::new();
    let rights = root.install("etc/pg-outbox etc/pg-outbox/config.yaml usr/bin/pg-outbox");
    let (_, group) = root.service_ids();
    assert_eq!(
        rights,
        [
            format!("etc/pg-outbox 750 0 {group}"),
            format!("etc/pg-outbox/config.yaml 640 0 {group}"),
            "usr/bin/pg-outbox 755 0 0".to_owned()
        ]
    );
    let version = output(Command::new(root.path("/usr/bin/pg-outbox")).arg("--version"));
    assert_eq!(version.trim_end(), format!("pg-outbox {}", env!("CARGO_PKG_VERSION")));

    let (db, stream) = (database(), stream());
    let config =
        Config::new(&db, &stream).set("database.dsn", "credential:dsn").set("nats.url", stream.url.as_str());
    let file = root.path("/etc/pg-outbox/config.yaml");
    fs::write(&file, config.yaml()).unwrap();
    fs::create_dir_all(root.path("/etc/credstore")).unwrap();
    fs::write(root.path("/etc/credstore/pg-outbox.dsn"), format!("{}\n", db.dispatcher_dsn())).unwrap();

    let unit = root.unit("pg-outbox.service");
    let systemd = NotifySocket::new();
    let daemon = root.start(&unit, &systemd);
    if is_root() {
        let owner = fs::metadata(format!("/proc/{}", daemon.pid())).unwrap().uid();
        assert_eq!(owner, root.service_ids().0, "it runs as the user of the unit");
    }
    db.events("order.placed", 50, 5);
    wait_drained(&db, &stream, &[&daemon], LIMIT);

    fs::write(&file, config.set_in("nats.topic_map", "order.placed", stream.subject("moved")).yaml())
        .unwrap();
    let reload = unit["ExecReload"][0].replace("$MAINPID", &daemon.pid().to_string());
    output(Command::new("sh").args(["-c", &reload]));
    systemd.wait("of the reload", &daemon, |message| message.starts_with("RELOADING=1\nMONOTONIC_USEC="));
    systemd.wait("that it is over", &daemon, |message| message == "READY=1");
    assert_eq!(daemon.log_lines("changed: nats.topic_map").len(), 1, "{}", daemon.log());
    db.event("order.placed", "k", "{}");
    wait_drained(&db, &stream, &[&daemon], LIMIT);
    stop(daemon, &systemd);

    db.event("order.placed", "k", "{}");
    let daemon = root.start(&unit, &systemd);
    wait_drained(&db, &stream, &[&daemon], LIMIT);
    stop(daemon, &systemd);
    let subjects: Vec<String> = stream.messages().into_iter().map(|message| message.subject).collect();
    assert_eq!(subjects.len(), 52);
    assert_eq!(subjects[50..], [stream.subject("moved"), stream.subject("moved")]);
}

#[test]
fn an_upgrade_keeps_the_configuration_and_a_purge_leaves_nothing() {
    let root = Root::new();
    root.install("etc/pg-outbox");
    let file = root.path("/etc/pg-outbox/config.yaml");
    fs::write(&file, "database: { dsn: credential:dsn }\n").unwrap();
    fs::set_permissions(&file, PermissionsExt::from_mode(0o644)).unwrap();
    let rights = root.install("etc/pg-outbox/config.yaml");
    assert_eq!(rights, [format!("etc/pg-outbox/config.yaml 640 0 {}", root.service_ids().1)]);
    assert_eq!(fs::read_to_string(&file).unwrap(), "database: { dsn: credential:dsn }\n");

    let wants = root.path("/etc/systemd/system/multi-user.target.wants");
    fs::create_dir_all(&wants).unwrap();
    std::os::unix::fs::symlink("/usr/lib/systemd/system/pg-outbox.service", wants.join("pg-outbox.service"))
        .unwrap();
    root.dpkg(&["--remove", "pg-outbox"], "true");
    assert!(file.exists() && !root.path("/usr/bin/pg-outbox").exists(), "removed, but not purged");
    root.dpkg(&["--purge", "pg-outbox"], "true");
    let left = output(Command::new("find").arg(root.0.path()).args(["-name", "*pg-outbox*"]));
    assert_eq!(left, "");
}

#[test]
fn the_package_has_all_that_belongs_to_it() {
    let listing = output(Command::new("dpkg-deb").arg("--contents").arg(package()));
    let files: Vec<(&str, &str)> = listing
        .lines()
        .map(|line| (&line[..10], line.split_whitespace().nth(5).unwrap().trim_start_matches("./")))
        .collect();
    for file in [
        "usr/bin/pg-outbox",
        "usr/lib/systemd/system/pg-outbox.service",
        "usr/lib/systemd/system/pg-outbox@.service",
        "usr/lib/sysusers.d/pg-outbox.conf",
        "usr/share/pg-outbox/schema/001_outbox.sql",
        "usr/share/pg-outbox/grafana-dashboard.json",
        "usr/share/pg-outbox/prometheus-alerts.yaml",
        "usr/share/pg-outbox/schema/roles.sql",
        "usr/share/man/man1/pg-outbox.1.gz",
        "usr/share/man/man1/pg-outbox-migrate.1.gz",
        "usr/share/man/man5/pg-outbox.yaml.5.gz",
        "usr/share/bash-completion/completions/pg-outbox",
        "usr/share/zsh/vendor-completions/_pg-outbox",
        "usr/share/fish/vendor_completions.d/pg-outbox.fish",
        "usr/share/doc/pg-outbox/copyright",
    ] {
        assert!(files.iter().any(|(_, name)| *name == file), "{file} is missing:\n{listing}");
    }
    assert!(
        files.contains(&("-rw-r-----", "etc/pg-outbox/config.yaml")),
        "never readable for all:\n{listing}"
    );
    let control = output(Command::new("dpkg-deb").arg("--field").arg(package()));
    assert!(control.contains("\nDepends: libc6 (>= 2."), "{control}");
    let conffiles = output(Command::new("dpkg-deb").arg("--info").arg(package()).arg("conffiles"));
    assert_eq!(conffiles, "/etc/pg-outbox/config.yaml\n");
    for script in ["postinst", "prerm", "postrm"] {
        output(Command::new("sh").arg("-n").arg(Path::new(SOURCE).join("etc/debian").join(script)));
    }
}

#[test]
fn manual_pages_and_completions_say_what_the_program_does() {
    let folder = tempfile::tempdir().unwrap();
    output(pg_outbox().arg("generate").arg(folder.path()));
    let page = |name: &str| {
        let path = folder.path().join("man").join(name);
        let mut groff = Command::new("groff");
        groff.args(["-man", "-ww", "-Tutf8", "-P-cbou", "-rHY=0"]).arg(&path);
        let shown = groff.output().expect("groff is missing: apt-get install groff-base");
        assert!(
            shown.status.success() && shown.stderr.is_empty(),
            "{name}: {}",
            String::from_utf8_lossy(&shown.stderr)
        );
        // In the font of a terminal a hyphen is a character of its own.
        let text = String::from_utf8(shown.stdout).unwrap().replace('\u{2010}', "-");
        // Where its lines break says nothing.
        text.split_whitespace().collect::<Vec<_>>().join(" ")
    };
    let help = output(pg_outbox().arg("--help"));
    let commands =
        help.lines().skip_while(|line| *line != "Commands:").skip(1).take_while(|line| !line.is_empty());
    let main = page("pg-outbox.1");
    let mut seen = 0;
    for command in commands.filter_map(|line| line.split_whitespace().next()).filter(|name| *name != "help") {
        seen += 1;
        assert!(main.contains(&format!("pg-outbox-{command}(1)")), "{command} is missing:\n{main}");
        page(&format!("pg-outbox-{command}.1"));
    }
    assert!(seen >= 4, "{help}");
    for word in ["--config", "SIGHUP", "Exit codes", "/etc/credstore/pg-outbox.dsn", "/etc/default/pg-outbox"]
    {
        assert!(main.contains(word), "{word} is missing:\n{main}");
    }
    let unit = include_str!("../systemd/pg-outbox.service");
    for loaded in unit.lines().filter_map(|line| line.strip_prefix("LoadCredential=")) {
        let (_, source) = loaded.split_once(':').unwrap();
        assert!(main.contains(source), "{source} is missing:\n{main}");
    }
    let config = page("pg-outbox.yaml.5");
    for text in [
        "dispatcher.batch_size (default: 100)",
        "nats.topic_map",
        "\"order.*\": \"production.orders.*\"",
        "credential:NAME",
    ] {
        assert!(config.contains(text), "{text} is missing:\n{config}");
    }
    let bash = folder.path().join("completions/pg-outbox");
    output(Command::new("bash").arg("-n").arg(&bash));
    for (words, expected) in [
        ("pg-outbox mig", "migrate"),
        ("pg-outbox partitions d", "drop"),
        ("pg-outbox partitions drop --dr", "--dry-run"),
        ("pg-outbox status --w", "--watch"),
    ] {
        let complete = format!(
            ". {}; COMP_WORDS=({words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); $(complete -p pg-outbox | grep -o '_pg[a-z_-]*') \
             pg-outbox \"${{COMP_WORDS[-1]}}\" \"${{COMP_WORDS[-2]}}\"; echo \"${{COMPREPLY[@]}}\"",
            bash.display()
        );
        assert_eq!(output(Command::new("bash").args(["-c", &complete])).trim_end(), expected, "{words}");
    }
}
