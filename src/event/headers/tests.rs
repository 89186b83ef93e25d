//! Events and the blocks that become of them, byte for byte, up to metadata that somebody wrote to do harm.

use std::time::{Duration, Instant};

use uuid::Uuid;

use super::*;
use crate::event::Place;
use crate::event::header_rules::{MAX_NAME_CHARS, MAX_NAMED, Reason, is_token};

fn policy() -> HeaderPolicy {
    HeaderPolicy {
        instance: "dispatcher-1".to_owned(),
        stream: Some("EVENTS".to_owned()),
        allow: vec!["Nats-TTL".to_owned(), "Nats-Msg-Id".to_owned()],
        replay: None,
    }
}

fn event(metadata: &str) -> Event {
    Event {
        id: Uuid::from_u128(0x0190_5c3e_7a00_7000_8000_0000_0000_0001),
        seq: 81_231,
        created_at: 0,
        topic: "order.placed".to_owned(),
        key_hash: 1,
        place: Place::default(),
        lane: 0,
        metadata: Some(metadata.to_owned()),
        payload: "{}".to_owned(),
        attempts: 0,
        in_retry: false,
        unreadable: None,
    }
}

const OWN: &str = "Nats-Msg-Id: 01905c3e-7a00-7000-8000-000000000001\r\n\
    Nats-Expected-Stream: EVENTS\r\n\
    Outbox-Seq: 81231\r\n\
    Outbox-Topic: order.placed\r\n\
    Outbox-Created-At: 2000-01-01T00:00:00.000000Z\r\n\
    Outbox-Attempt: 1\r\n\
    Outbox-Instance: dispatcher-1\r\n";

#[test]
fn our_headers_come_first_and_then_metadata_in_its_order() {
    let headers = policy().build(&event(r#"{"source": "shop", "a": "1"}"#));
    assert_eq!(headers.block, format!("{OWN}source: shop\r\na: 1\r\n"));
    assert_eq!(headers.altered, Altered::default());

    let again = HeaderPolicy { replay: Some("r1".to_owned()), ..policy() }.build(&event("{}"));
    let own = OWN.replace("0001\r\n", "0001.r1\r\n");
    assert_eq!(again.block, format!("{own}Outbox-Replay: r1\r\n"));

    let bare = HeaderPolicy { stream: None, ..policy() }.build(&Event { metadata: None, ..event("") });
    assert_eq!(bare.block, OWN.replace("Nats-Expected-Stream: EVENTS\r\n", ""));
    assert_eq!(bare.altered.count, 0);
}

#[test]
fn a_field_becomes_a_header() {
    let cases = [
        (r#"{"s": "as it is: ü \" \\ / 😀"}"#, "s: as it is: ü \" \\ / 😀\r\n"),
        (r#"{"s": "\u00e9\ud83d\ude00"}"#, "s: é😀\r\n"),
        (r#"{"s": ""}"#, "s: \r\n"),
        (r#"{"s": " both ends "}"#, "s:  both ends \r\n"),
        (r#"{"n": 42}"#, "n: 42\r\n"),
        (r#"{"n": -0.10000}"#, "n: -0.10000\r\n"),
        (
            r#"{"n": 123456789012345678901234567890.123456789}"#,
            "n: 123456789012345678901234567890.123456789\r\n",
        ),
        (r#"{"n": 1e400}"#, "n: 1e400\r\n"),
        (r#"{"b": true, "c": false}"#, "b: true\r\nc: false\r\n"),
        (r#"{"z": null}"#, ""),
        (
            r#"{"o": {"a": 1, "b": [1, 2, {"c d": "e  f"}]}}"#,
            "o: {\"a\":1,\"b\":[1,2,{\"c d\":\"e  f\"}]}\r\n",
        ),
        (r#"{"o": {"q": "\" : ,\\"}, "p": []}"#, "o: {\"q\":\"\\\" : ,\\\\\"}\r\np: []\r\n"),
        ("{\"o\": [\n\t1 ,\r\n 2 ]}", "o: [1,2]\r\n"),
        (r#"{"Trace": "1", "trace": "2"}"#, "Trace: 1\r\ntrace: 2\r\n"),
        (r#"{"tr\u0061ce": "1"}"#, "trace: 1\r\n"),
        (r#"{"!#$%&'*+-.^_`|~09az": "1"}"#, "!#$%&'*+-.^_`|~09az: 1\r\n"),
        // Words like these are nobody's command.
        (r#"{"source": "nats-bridge, outbox-relay, £5"}"#, "source: nats-bridge, outbox-relay, £5\r\n"),
        (r#"{"x-nats-cluster": "eu"}"#, "x-nats-cluster: eu\r\n"),
        (r#"{"Nats-TTL": "5s"}"#, "Nats-TTL: 5s\r\n"),
        ("{}", ""),
        (" {} ", ""),
    ];
    for (metadata, expected) in cases {
        let headers = policy().build(&event(metadata));
        assert_eq!(headers.block, format!("{OWN}{expected}"), "{metadata}");
        assert_eq!(headers.altered, Altered::default(), "{metadata}");
    }
}

#[test]
fn what_cannot_be_a_header_is_left_out_or_changed() {
    use Reason::*;
    let cases = [
        (r#"{"": "1"}"#, "", "", NotAToken),
        (r#"{"a b": "1"}"#, "", "a b", NotAToken),
        (r#"{"a:b": "1"}"#, "", "a:b", NotAToken),
        (r#"{"ä": "1"}"#, "", "ä", NotAToken),
        (r#"{"a\r\nNats-Rollup": "all"}"#, "", "a\\r\\nNats-Rollup", NotAToken),
        (r#"{"Nats-Msg-Id": "1"}"#, "", "Nats-Msg-Id", Reserved),
        (r#"{"nats-msg-id": "1"}"#, "", "nats-msg-id", Reserved),
        (r#"{"NATS-Anything": "1"}"#, "", "NATS-Anything", Reserved),
        // Allowed, but not in this spelling.
        (r#"{"nats-ttl": "1"}"#, "", "nats-ttl", Reserved),
        (r#"{"Nats-Rollup": "all"}"#, "", "Nats-Rollup", Reserved),
        (r#"{"Outbox-Seq": 1}"#, "", "Outbox-Seq", Reserved),
        (r#"{"outbox-new": 1}"#, "", "outbox-new", Reserved),
        (r#"{"X-Nats-Rollup": "all"}"#, "", "X-Nats-Rollup", NameCarriesHeader),
        (r#"{"x-nats-rollup": "all"}"#, "", "x-nats-rollup", NameCarriesHeader),
        (r#"{"X-Nats-New": "all"}"#, "", "X-Nats-New", NameCarriesHeader),
        (r#"{"My-Outbox-Seq": "1"}"#, "", "My-Outbox-Seq", NameCarriesHeader),
        (r#"{"v": "a\r\nNats-Rollup: all"}"#, "v: a  Nats_Rollup: all\r\n", "v", ValueCarriesHeader),
        (r#"{"v": "Nats-Msg-Id:1"}"#, "v: Nats_Msg-Id:1\r\n", "v", ValueCarriesHeader),
        (r#"{"v": "xNATS-MSG-ID"}"#, "v: xNATS_MSG-ID\r\n", "v", ValueCarriesHeader),
        (r#"{"v": "Nats-"}"#, "v: Nats_\r\n", "v", ValueCarriesHeader),
        (r#"{"v": "é Outbox-Seq: 1"}"#, "v: é Outbox_Seq: 1\r\n", "v", ValueCarriesHeader),
        (r#"{"v": {"Nats-Rollup": "all"}}"#, "v: {\"Nats_Rollup\":\"all\"}\r\n", "v", ValueCarriesHeader),
        (r#"{"v": "a\nb"}"#, "v: a b\r\n", "v", ControlCharacters),
        (r#"{"v": "a\tb\u0001c\u007fd\u0085e"}"#, "v: a b c d e\r\n", "v", ControlCharacters),
        ("{\"v\": \"\u{85}£\"}", "v:  £\r\n", "v", ControlCharacters),
        (r#"{"v": "\ud800"}"#, "", "v", NotText),
        (r#"["a"]"#, "", "metadata", NotAnObject),
        ("null", "", "metadata", NotAnObject),
        (r#""text""#, "", "metadata", NotAnObject),
        ("", "", "metadata", NotAnObject),
        (r#"{"v": "1", "w": }"#, "v: 1\r\n", "metadata", NotJson),
        (r#"{"v": "1"} x"#, "v: 1\r\n", "metadata", NotJson),
    ];
    for (metadata, expected, name, reason) in cases {
        let headers = policy().build(&event(metadata));
        assert_eq!(headers.block, format!("{OWN}{expected}"), "{metadata}");
        let altered = Altered { count: 1, named: vec![(name.to_owned(), reason)] };
        assert_eq!(headers.altered, altered, "{metadata}");
    }
}

#[test]
fn a_topic_cannot_carry_a_header_either() {
    let event = Event { topic: "Nats-Rollup:all\r\n".to_owned(), attempts: u32::MAX, ..event("{}") };
    let headers = policy().build(&event);
    assert!(headers.block.contains("\r\nOutbox-Topic: Nats_Rollup:all  \r\n"), "{}", headers.block);
    assert!(headers.block.contains("\r\nOutbox-Attempt: 4294967295\r\n"), "{}", headers.block);
    assert_eq!(headers.altered.named, [("Outbox-Topic".to_owned(), Reason::ValueCarriesHeader)]);
}

#[test]
fn what_is_altered_is_named_in_bounded_space() {
    let long = "ä".repeat(1_000);
    let fields: Vec<String> = (0..20).map(|n| format!("\"{n} {long}\": 1")).collect();
    let altered = policy().build(&event(&format!("{{{}}}", fields.join(",")))).altered;
    assert_eq!((altered.count, altered.named.len()), (20, MAX_NAMED));
    assert!(altered.named.iter().all(|(name, _)| name.chars().count() == MAX_NAME_CHARS));
    assert!(altered.to_string().ends_with("cannot have; and 12 more"), "{altered}");
}

#[test]
fn a_creation_time_is_printed_whatever_the_row_holds() {
    const DAY: i64 = 86_400_000_000;
    let cases = [
        (0, "2000-01-01T00:00:00.000000Z"),
        (-1, "1999-12-31T23:59:59.999999Z"),
        (59 * DAY, "2000-02-29T00:00:00.000000Z"),
        (60 * DAY, "2000-03-01T00:00:00.000000Z"),
        (365 * DAY, "2000-12-31T00:00:00.000000Z"),
        (-10_957 * DAY, "1970-01-01T00:00:00.000000Z"),
        (762_352_245_678_901, "2024-02-27T12:30:45.678901Z"),
        (252_455_615_999_999_999, "9999-12-31T23:59:59.999999Z"),
        (252_455_616_000_000_000, "+10000-01-01T00:00:00.000000Z"),
        // The ends of timestamptz: 294276-12-31 and 4713-11-24 BC.
        (9_223_371_331_199_999_999, "+294276-12-31T23:59:59.999999Z"),
        (-211_813_488_000_000_000, "-4713-11-24T00:00:00.000000Z"),
        (i64::MAX, "infinity"),
        (i64::MIN, "-infinity"),
    ];
    for (micros, expected) in cases {
        assert_eq!(CreationTime(micros).to_string(), expected, "{micros}");
    }
    let extremes = [i64::MAX - 1, i64::MIN + 1].map(|micros| CreationTime(micros).to_string());
    assert_eq!(extremes[0], "+294277-01-09T04:00:54.775806Z");
}

#[test]
fn deep_nesting_is_flattened_without_recursion() {
    let depth = 100_000;
    let metadata = format!("{{\"deep\": {}1{}}}", "[ ".repeat(depth), " ]".repeat(depth));
    let headers = policy().build(&event(&metadata));
    let expected = format!("{OWN}deep: {}1{}\r\n", "[".repeat(depth), "]".repeat(depth));
    assert!(headers.block == expected);
    assert_eq!(headers.altered.count, 0);
}

#[test]
fn the_time_grows_with_the_number_of_fields_and_no_faster() {
    let build = |fields: usize| {
        let fields: Vec<String> = (0..fields).map(|n| format!("\"Field-{n}\": \"Nats-{n}\"")).collect();
        let event = event(&format!("{{{}}}", fields.join(", ")));
        let began = Instant::now();
        (policy().build(&event), began.elapsed())
    };
    let (headers, took) = build(200_000);
    assert_eq!(headers.block.lines().count(), 7 + 200_000);
    assert_eq!(headers.altered.count, 200_000);
    // Quadratic work would take minutes; linear work takes a fraction of a second in a debug build.
    assert!(took < Duration::from_secs(20), "200,000 fields took {took:?}");
}

/// Whatever the metadata: our lines come first and unchanged, each further line is `token: value`, and no
/// reserved name occurs in them.
#[test]
fn no_metadata_forges_a_line() {
    let mut random = fastrand::Rng::with_seed(11);
    let pieces = [
        "Nats-",
        "nats-",
        "Msg-Id",
        "MSG-ID",
        "Rollup",
        "Expected-Stream",
        "Outbox-",
        "Seq",
        ":",
        " ",
        "\\r",
        "\\n",
        "\\u0000",
        "\\u0085",
        "\\\"",
        "\\\\",
        "-",
        "é",
        "😀",
        "a",
        "X-",
        "[",
        "}",
        "\\u004eats-",
    ];
    let mut pick = |limit: usize| -> String {
        (0..random.usize(..limit)).map(|_| pieces[random.usize(..pieces.len())]).collect()
    };
    let policy = HeaderPolicy { allow: vec![], ..policy() };
    for _ in 0..20_000 {
        let (name, value, inner) = (pick(4), pick(8), pick(8));
        let metadata = format!("{{\"{name}\": \"{value}\", \"o\": {{\"{inner}\": [\"{value}\", 1 ]}}}}");
        let headers = policy.build(&event(&metadata));
        let rest = headers.block.strip_prefix(OWN).expect("our headers first");
        for line in rest.split_terminator("\r\n") {
            let (name, value) = line.split_once(": ").expect("a header line");
            assert!(is_token(name), "{metadata} made {line:?}");
            assert!(!value.contains(char::is_control), "{metadata} made {line:?}");
            assert!(!line.contains("Nats-"), "{metadata} made {line:?}");
            let lower = line.to_ascii_lowercase();
            for reserved in ["nats-msg-id", "nats-rollup", "nats-expected-", "outbox-seq"] {
                assert!(!lower.contains(reserved), "{metadata} made {line:?}");
            }
        }
    }
}
