//! The status page in a real browser: it draws itself, its numbers move while events flow, it shows an outage and what
//! died, and whatever an event or an error holds stays text.

use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use pg_outbox::lab::sandbox::Stop;
use pg_outbox::lab::sandbox::StoreState;
use serde_json::{Value, json};

use super::harness::browser::{Browser, Look};
use super::harness::{Config, Daemon, TestStream, database, start_nats, stream, wait_until};

const LIMIT: Duration = Duration::from_secs(60);
const DESKTOP: Look = Look { width: 1120, height: 900, scheme: "light" };

/// Where the pictures go that somebody looks at.
fn keep(name: &str, picture: &[u8]) {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("page");
    fs::create_dir_all(&folder).unwrap();
    fs::write(folder.join(format!("{name}.png")), picture).unwrap();
}

/// Pictures in every shape.
fn pictures(browser: &mut Browser, name: &str) {
    for (shape, width, height, scheme) in
        [("light", 1120, 900, "light"), ("dark", 1120, 900, "dark"), ("phone", 390, 844, "light")]
    {
        browser.look(Look { width, height, scheme });
        // Two frames: one may be under way.
        browser.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))");
        let overflow = browser.run("document.documentElement.scrollWidth - innerWidth");
        assert!(overflow.as_f64().unwrap() <= 0.0, "{name} {shape}: {overflow} px too wide");
        let picture = browser.screenshot();
        assert!(picture.starts_with(b"\x89PNG"), "{name} {shape}");
        keep(&format!("{name}-{shape}"), &picture);
    }
    browser.look(DESKTOP);
}

/// The numbers in a text, without the commas between thousands.
fn first_number(text: &str) -> Option<f64> {
    let word = text.split(|c: char| c.is_whitespace() || c == '/').next()?;
    word.replace(',', "").parse().ok()
}

#[test]
fn the_numbers_move_while_events_flow_and_an_outage_shows() {
    let db = database();
    let mut nats = start_nats("");
    let stream = TestStream::on(&nats.url(), &json!({}));
    let daemon = Daemon::start(&Config::new(&db, &stream).set("dispatcher.instance_id", "north"));
    daemon.wait_ready();
    let mut browser = Browser::start();
    browser.look(DESKTOP);
    browser.visit(&daemon.url("/"));
    wait_until("the page is ready", LIMIT, &[&daemon], || browser.text("verdict") == "Ready");
    pictures(&mut browser, "empty");

    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                db.events("order.placed", 30, 7);
                thread::sleep(Duration::from_millis(20));
            }
        });
        let seen = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| flowing(&mut browser, &daemon)));
        done.store(true, Ordering::Relaxed);
        seen.unwrap();
    });

    assert_eq!(browser.complaints(), Vec::<String>::new());
    nats.stop(Stop::Fast).unwrap();
    db.events("order.placed", 500, 7);
    wait_until("the outage shows", LIMIT, &[&daemon], || {
        browser.text("verdict") == "Outage" && browser.text("reasons").contains("Connection refused")
    });
    wait_until("the charts show it too", LIMIT, &[&daemon], || {
        browser.run("document.querySelectorAll('#rate rect').length > 0") == true
            && first_number(&browser.inner("#backlog .value")) >= Some(500.0)
    });
    pictures(&mut browser, "outage");
    nats.start_again(StoreState::Kept).unwrap();
    wait_until("it is over", LIMIT, &[&daemon], || {
        let verdict = browser.text("verdict");
        verdict == "Ready" || verdict == "Publishing"
    });
    assert_eq!(browser.complaints(), Vec::<String>::new());
    drop(daemon);
    wait_until("the page says that nobody answers", LIMIT, &[], || browser.text("verdict") == "No answer");
    pictures(&mut browser, "gone");
}

fn flowing(browser: &mut Browser, daemon: &Daemon) {
    let mut rates = Vec::new();
    wait_until("the page publishes", LIMIT, &[daemon], || browser.text("verdict") == "Publishing");
    wait_until("rate and total moved several times, and latency is known", LIMIT, &[daemon], || {
        let total = browser.inner("#rate .beside");
        if rates.last() != Some(&total) {
            rates.push(total);
        }
        rates.len() >= 4
            && browser.inner("#latency .value") != "–"
            && first_number(&browser.inner("#rate .value")) > Some(0.0)
    });
    // A page that is opened now shows what was before.
    let points = "document.querySelector('#rate path:not(.area)').getAttribute('d').split('L').length";
    wait_until("the chart has a line", LIMIT, &[daemon], || {
        browser.visit(&daemon.url("/"));
        browser.run(points).as_u64() >= Some(3)
    });
    pictures(browser, "traffic");
}

#[test]
fn whatever_an_event_holds_stays_text() {
    let (db, stream) = (database(), stream());
    let hostile = "<img src=x onerror=\"document.title='owned'\"></script><script>document.title='owned'</script>\
                   <!-- \u{202e}desrever ' \" & \\u003cb\\u003e";
    let mut client = db.client();
    let insert =
        "INSERT INTO outboxes (topic, metadata, payload, dead_at, next_attempt_at, attempts, last_error)
                  VALUES ($1, '{\"ordering-key\": \"secret-key\"}', '{\"secret\": 1}',
                          CASE WHEN $3 THEN now() - interval '3 minutes' END,
                          CASE WHEN NOT $3 THEN now() + interval '4 minutes' END, 3, $2)";
    for (topic, reason, dead) in [
        ("a.<img/src=x/onerror=document&title".to_owned(), hostile.to_owned(), true),
        (
            "order.placed".to_owned(),
            "message of 1204331 B is over the server's max_payload of 1048576 B".to_owned(),
            true,
        ),
        ("b.<b/bold".to_owned(), hostile.to_owned(), false),
        ("c".to_owned(), "long ".repeat(1000), true),
    ] {
        client.execute(insert, &[&topic, &reason, &dead]).unwrap();
    }
    for n in 0..25 {
        client.execute(insert, &[&format!("order.n{n}"), &"no stream takes subject", &true]).unwrap();
    }
    client
        .execute(
            "UPDATE outboxes SET dead_at = now() WHERE topic NOT LIKE 'order.n%' AND dead_at IS NOT NULL",
            &[],
        )
        .unwrap();
    let config =
        Config::new(&db, &stream).set("dispatcher.instance_id", "<u>north</u>").set("metrics.path", "/m'<i>");
    let daemon = Daemon::start(&config);
    daemon.wait_ready();

    let mut browser = Browser::start();
    browser.look(DESKTOP);
    browser.visit(&daemon.url("/"));
    wait_until("dead letters and retries show", LIMIT, &[&daemon], || {
        browser.text("letters").contains("max_payload") && browser.text("retries").contains("<b/bold")
    });
    for id in ["letters", "retries"] {
        let shown = browser.run(&format!("document.getElementById('{id}').textContent"));
        assert!(shown.as_str().unwrap().contains(hostile), "{id}: {shown}");
    }
    // As it was when it came, too: its first facts are in the document.
    browser.visit(&daemon.url("/"));
    assert_eq!(browser.run("document.getElementById('letters').textContent.includes('onerror')"), true);
    assert_eq!(browser.run("document.querySelectorAll('img, b, i, u').length"), 0);
    assert_eq!(browser.run("document.scripts.length"), 2);
    assert_eq!(browser.run("document.title.includes('owned')"), false);
    assert_eq!(browser.text("instance"), "<u>north</u>");
    assert_eq!(browser.text("letters-count"), "28");
    assert_eq!(browser.run("document.querySelectorAll('#letters tbody tr').length"), 20);
    assert!(browser.text("letters-more").contains("20 of 28"));
    let everything = browser.run("document.documentElement.outerHTML");
    assert!(!everything.as_str().unwrap().contains("secret"), "a payload or a key is on the page");
    pictures(&mut browser, "letters");
    assert_eq!(browser.complaints(), Vec::<String>::new());

    // The fence behind: a script or a style that would get in after all does not run.
    let (status, recent) = (daemon.get("/status"), daemon.get("/recent"));
    assert_eq!((status.0, recent.0), (200, 200));
    let recent: Value = serde_json::from_str(&recent.1).unwrap();
    assert_eq!(recent["dead_letters"].as_array().unwrap().len(), 20);
    assert_eq!(recent["retries"][0]["attempts"], 3);
    browser.run(
        "const script = document.createElement('script'); script.append(\"document.title = 'owned'\");
         try { document.body.append(script) } catch {}
         try { document.body.innerHTML += '<img src=x>' } catch {}",
    );
    assert_eq!(browser.run("document.title.includes('owned')"), false);
    assert_eq!(browser.run("document.querySelectorAll('img').length"), 0);
    assert!(!browser.complaints().is_empty(), "the browser refuses them aloud");
}
