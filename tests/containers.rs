//! The container examples, judged without a container engine: what they say about the program must be true.

use std::fs;
use std::path::Path;

use serde::Deserialize;
use serde_yaml::Value;

use super::harness::daemon::pg_outbox;

const DOCKERFILE: &str = include_str!("../etc/container/Dockerfile");
const KUBERNETES: &str = include_str!("../etc/container/kubernetes.yaml");
const CARGO: &str = include_str!("../Cargo.toml");

/// The manifest of this kind.
fn manifest(kind: &str) -> Value {
    let documents =
        serde_yaml::Deserializer::from_str(KUBERNETES).map(|one| Value::deserialize(one).unwrap());
    documents.into_iter().find(|one| one["kind"] == kind).unwrap_or_else(|| panic!("no {kind}"))
}

/// The instructions of the Dockerfile: name and arguments.
fn instructions() -> Vec<(&'static str, &'static str)> {
    let lines = DOCKERFILE.lines().filter(|line| !line.starts_with('#') && !line.is_empty());
    lines.map(|line| line.split_once(' ').unwrap()).collect()
}

fn instruction(name: &str) -> &'static str {
    instructions().into_iter().rfind(|(known, _)| *known == name).unwrap_or_else(|| panic!("no {name}")).1
}

fn words(list: &Value) -> Vec<String> {
    list.as_sequence().unwrap().iter().map(|word| word.as_str().unwrap().to_owned()).collect()
}

/// A command line that the program takes: with `--help` behind it, it explains itself instead of running.
#[track_caller]
fn assert_understood(arguments: &[String]) {
    let output = pg_outbox().args(arguments).arg("--help").output().unwrap();
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn the_image_runs_what_it_builds_and_not_as_root() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let copied: Vec<&str> =
        instructions().into_iter().filter(|(name, _)| *name == "COPY").map(|(_, what)| what).collect();
    for sources in copied.iter().filter(|what| !what.starts_with("--from")) {
        let (sources, _) = sources.rsplit_once(' ').unwrap();
        for source in sources.split(' ') {
            assert!(root.join(source).exists(), "{source} is not there to be copied");
        }
    }
    // What the build reads beside the sources: files that are built in, and the paths that Cargo.toml names.
    let is_copied = |path: &str| {
        copied.iter().any(|what| {
            what.split(' ').any(|source| path == source || path.starts_with(&format!("{source}/")))
        })
    };
    for path in [
        "Cargo.toml",
        "Cargo.lock",
        "src/main.rs",
        "schema/001_outbox.sql",
        "etc/config.yaml",
        "tests/main.rs",
    ] {
        assert!(is_copied(path), "{path} is not copied");
    }
    let program = copied.last().unwrap().rsplit_once(' ').unwrap().1;
    let entrypoint: Value = serde_yaml::from_str(instruction("ENTRYPOINT")).unwrap();
    assert_eq!(words(&entrypoint), [program]);
    assert_understood(&words(&serde_yaml::from_str(instruction("CMD")).unwrap()));
    let user: u32 = instruction("USER").split(':').next().unwrap().parse().unwrap();
    assert!(user > 0);
    assert_eq!(manifest("Deployment")["spec"]["template"]["spec"]["securityContext"]["runAsUser"], user);
    let wanted =
        CARGO.lines().find_map(|line| line.strip_prefix("rust-version = ")).unwrap().trim_matches('"');
    assert!(DOCKERFILE.contains(&format!("FROM rust:{wanted}-")), "the image builds with Rust {wanted}");
}

#[test]
fn the_manifests_fit_the_program_and_each_other() {
    let deployment = manifest("Deployment");
    assert_eq!(deployment["spec"]["replicas"], 3);
    let pod = &deployment["spec"]["template"];
    for selector in [&deployment["spec"]["selector"], &manifest("PodDisruptionBudget")["spec"]["selector"]] {
        assert_eq!(selector["matchLabels"], pod["metadata"]["labels"]);
    }
    assert_eq!(manifest("PodDisruptionBudget")["spec"]["maxUnavailable"], 1);
    let spec = &pod["spec"];
    let container = &spec["containers"][0];
    assert_eq!(spec["securityContext"]["runAsNonRoot"], true);
    assert_eq!(container["securityContext"]["readOnlyRootFilesystem"], true);

    let arguments = words(&container["args"]);
    assert_understood(&arguments);
    let mounted = |volume: &str| {
        let mounts = container["volumeMounts"].as_sequence().unwrap();
        let mount = mounts.iter().find(|mount| mount["name"] == volume).unwrap();
        mount["mountPath"].as_str().unwrap().to_owned()
    };
    assert!(arguments.contains(&format!("{}/config.yaml", mounted("config"))), "{arguments:?}");
    let volumes = spec["volumes"].as_sequence().unwrap();
    let names = |kind: &str, name: &str| {
        volumes.iter().find_map(|volume| volume[kind][name].as_str().map(str::to_owned))
    };
    assert_eq!(names("configMap", "name").as_deref(), manifest("ConfigMap")["metadata"]["name"].as_str());
    assert!(KUBERNETES.contains(&format!(
        "create secret generic {} --from-literal=dsn=",
        names("secret", "secretName").unwrap()
    )));

    // The configuration, with the secret where it will be.
    let text = manifest("ConfigMap")["data"]["config.yaml"].as_str().unwrap().to_owned();
    let secrets = tempfile::tempdir().unwrap();
    fs::write(secrets.path().join("dsn"), "postgresql://outbox@db/app").unwrap();
    assert!(text.contains(&format!("file:{}/dsn", mounted("secrets"))), "{text}");
    let text = text.replace(&mounted("secrets"), secrets.path().to_str().unwrap());
    let config = pg_outbox::config::Config::parse(&text, "config.yaml", |_| None).unwrap();
    assert_eq!(config.database.dsn.expose(), "postgresql://outbox@db/app");

    let port = u64::from(config.metrics.port);
    assert_eq!(container["ports"][0]["containerPort"], port);
    assert_eq!(pod["metadata"]["annotations"]["prometheus.io/port"], port.to_string());
    assert_eq!(pod["metadata"]["annotations"]["prometheus.io/path"], config.metrics.path.as_str());
    assert_eq!(instruction("EXPOSE"), port.to_string());
    for (probe, path) in [("livenessProbe", "/health"), ("readinessProbe", "/ready")] {
        assert_eq!(container[probe]["httpGet"]["path"], path);
        assert_eq!(container[probe]["httpGet"]["port"], container["ports"][0]["name"]);
    }
    let grace = spec["terminationGracePeriodSeconds"].as_u64().unwrap();
    assert!(grace > config.dispatcher.shutdown_grace.as_secs(), "killed before it has drained");
}
