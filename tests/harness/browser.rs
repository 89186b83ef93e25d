//! A headless Chromium, told what to do over its own pipe, in the words of the Chrome DevTools Protocol.
//!
//! `--remote-debugging-pipe` reads messages from descriptor 3 and writes to 4, each ended by a zero byte, so that no
//! port is open and no WebSocket spoken. What the page complains about (the console, exceptions, refused requests and
//! scripts) is kept for the test to look at. The browser ends with its pipe, or with its guard.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use pg_outbox::lab::sandbox::Guard;
use serde_json::{Value, json};

use super::Evidence;

/// Longest wait for an answer of the browser; its start, on a busy machine, is the slowest.
const ANSWER_LIMIT: Duration = Duration::from_secs(60);
/// As root it cannot have its sandbox; the rest keeps it from talking to anybody but the page.
const ARGUMENTS: [&str; 14] = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-extensions",
    "--disable-default-apps",
    "--mute-audio",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
];

/// One browser with one page in it.
pub struct Browser {
    child: Child,
    _guard: Guard,
    to: ChildStdin,
    from: Receiver<Value>,
    session: Option<String>,
    next_id: u64,
    complaints: Vec<String>,
}

/// How the page is looked at.
#[derive(Debug, Clone, Copy)]
pub struct Look {
    /// Width of the window in CSS pixels.
    pub width: u32,
    /// Its height.
    pub height: u32,
    /// `light` or `dark`.
    pub scheme: &'static str,
}

impl Browser {
    /// Starts it, with an empty page.
    pub fn start() -> Browser {
        let folder = tempfile::Builder::new().prefix("pg-outbox-chromium-").tempdir().unwrap();
        let mut guard = Guard::over(folder.path(), "KILL").unwrap();
        let folder = folder.keep();
        let profile = folder.join("profile");
        let mut command = Command::new("/bin/sh");
        command.args(["-c", "exec \"$0\" \"$@\" 3<&0 4>&1 < /dev/null >&2", "chromium"]).args(ARGUMENTS);
        command.arg(format!("--user-data-dir={}", profile.display())).env("HOME", &folder).process_group(0);
        command.stderr(File::create(folder.join("stderr")).unwrap());
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        guard.watch(child.id()).unwrap();
        let (to, from) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        let (send, receive) = channel();
        std::thread::spawn(move || {
            for message in BufReader::new(from).split(0) {
                let Ok(message) = message else { return };
                if send.send(serde_json::from_slice(&message).unwrap()).is_err() {
                    return;
                }
            }
        });
        let (session, next_id, complaints) = (None, 1, Vec::new());
        let mut browser = Browser { child, _guard: guard, to, from: receive, session, next_id, complaints };
        browser.open(&folder);
        browser
    }

    fn open(&mut self, folder: &Path) {
        let target = self.try_call("Target.createTarget", &json!({"url": "about:blank"})).unwrap_or_else(|cause| {
            let said = std::fs::read_to_string(folder.join("stderr")).unwrap_or_default();
            panic!("no browser, {cause}; is chromium installed? tests/run.sh does it: apt-get install chromium\n{said}")
        });
        let attach = json!({"targetId": target["targetId"], "flatten": true});
        let session = self.call("Target.attachToTarget", &attach);
        self.session = Some(session["sessionId"].as_str().unwrap().to_owned());
        for domain in ["Page", "Runtime", "Log", "Network"] {
            self.call(&format!("{domain}.enable"), &json!({}));
        }
    }

    /// Sizes the window and chooses the colours.
    pub fn look(&mut self, look: Look) {
        let metrics = json!({"width": look.width, "height": look.height, "deviceScaleFactor": 1, "mobile": look.width < 600});
        self.call("Emulation.setDeviceMetricsOverride", &metrics);
        let features = json!([{"name": "prefers-color-scheme", "value": look.scheme}]);
        self.call("Emulation.setEmulatedMedia", &json!({"features": features}));
    }

    /// Goes to a page, from an empty one, and waits until its script has run.
    pub fn visit(&mut self, url: &str) {
        let answer = self.call("Page.navigate", &json!({"url": url}));
        assert!(answer["errorText"].is_null(), "{url}: {answer}");
        let deadline = Instant::now() + ANSWER_LIMIT;
        while self.run("document.readyState") != "complete" {
            assert!(Instant::now() < deadline, "{url} is not loaded");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// The value of an expression in the page.
    #[track_caller]
    pub fn run(&mut self, expression: &str) -> Value {
        let answer = self.call(
            "Runtime.evaluate",
            &json!({"expression": expression, "returnByValue": true, "awaitPromise": true}),
        );
        assert!(answer["exceptionDetails"].is_null(), "{expression}: {answer}");
        answer["result"]["value"].clone()
    }

    /// The text of the element with this id, as it is seen.
    #[track_caller]
    pub fn text(&mut self, id: &str) -> String {
        self.inner(&format!("#{id}"))
    }

    /// The text of the first element that this selector finds, as it is seen.
    #[track_caller]
    pub fn inner(&mut self, selector: &str) -> String {
        let text = self.run(&format!("document.querySelector({selector:?}).innerText"));
        text.as_str().unwrap_or_default().to_owned()
    }

    /// A picture of the whole page, as PNG.
    pub fn screenshot(&mut self) -> Vec<u8> {
        use base64::Engine as _;
        let answer =
            self.call("Page.captureScreenshot", &json!({"format": "png", "captureBeyondViewport": true}));
        base64::engine::general_purpose::STANDARD.decode(answer["data"].as_str().unwrap()).unwrap()
    }

    /// What the page has complained about so far: errors and warnings of the console, exceptions, refused requests.
    pub fn complaints(&mut self) -> Vec<String> {
        // Whatever was said before this answer has arrived by then.
        self.call("Runtime.evaluate", &json!({"expression": "1"}));
        self.complaints.clone()
    }

    #[track_caller]
    fn call(&mut self, method: &str, params: &Value) -> Value {
        self.try_call(method, params).unwrap_or_else(|cause| panic!("{method}: {cause}"))
    }

    fn try_call(&mut self, method: &str, params: &Value) -> Result<Value, String> {
        let id = self.next_id;
        self.next_id += 1;
        let mut message = json!({"id": id, "method": method, "params": params});
        if let Some(session) = &self.session {
            message["sessionId"] = session.clone().into();
        }
        let mut bytes = message.to_string().into_bytes();
        bytes.push(0);
        self.to.write_all(&bytes).map_err(|error| error.to_string())?;
        let deadline = Instant::now() + ANSWER_LIMIT;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let mut answer = self.from.recv_timeout(left).map_err(|error| format!("no answer: {error}"))?;
            if answer["id"] == id {
                let error = answer["error"].take();
                return if error.is_null() { Ok(answer["result"].take()) } else { Err(error.to_string()) };
            }
            self.complaints.extend(complaint(&answer));
        }
    }
}

/// What an event of the browser says against the page, if it does.
fn complaint(event: &Value) -> Option<String> {
    let params = &event["params"];
    let bad = match event["method"].as_str()? {
        "Runtime.exceptionThrown" | "Network.loadingFailed" => true,
        "Runtime.consoleAPICalled" => params["type"] != "log" && params["type"] != "debug",
        "Log.entryAdded" => params["entry"]["level"] == "error" || params["entry"]["level"] == "warning",
        "Network.requestWillBeSent" | "Network.responseReceived" => {
            params["response"]["status"].as_u64().is_some_and(|status| status >= 400)
        }
        _ => false,
    };
    bad.then(|| event.to_string())
}

impl Evidence for Browser {
    fn evidence(&self) -> String {
        format!("--- complaints of the page\n{}", self.complaints.join("\n"))
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
