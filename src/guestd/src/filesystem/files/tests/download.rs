//! Downloads.

use std::fs::{File, FileTimes};
use std::os::unix::net::UnixListener;
use std::time::{Duration, SystemTime};

use axum::body::Body;
use http::{Request, StatusCode};
use serde_json::json;

use super::{Answer, gunzip, query, send};
use crate::filesystem::tests::Fixture;

type Headers<'a> = &'a [(&'a str, &'a str)];

async fn get(fixture: &Fixture, path: &str, headers: Headers<'_>) -> Answer {
    let mut request = Request::get(query(&[("path", path)]));
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    send(fixture, request.body(Body::empty()).unwrap()).await
}

/// Larger than what is read at once and than a chunk, and of no regular length.
fn large() -> Vec<u8> {
    (0..700_001_u32).map(|number| (number % 251) as u8).collect()
}

#[tokio::test]
async fn a_file_comes_whole_with_its_headers() {
    let fixture = Fixture::new();
    fixture.write("dir/hello.txt", "hällo");
    let answer = get(&fixture, "dir/hello.txt", &[]).await;
    assert_eq!((answer.status, answer.text()), (StatusCode::OK, "hällo"));
    assert_eq!(answer.header("content-type"), "text/plain; charset=utf-8");
    assert_eq!(answer.header("content-length"), "6");
    assert_eq!(answer.header("content-disposition"), "inline; filename=hello.txt");
    assert_eq!(answer.header("vary"), "Accept-Encoding");
    assert_eq!(answer.header("accept-ranges"), "bytes");
    assert!(answer.header("last-modified").ends_with("GMT"));
    assert_eq!(answer.header("content-encoding"), "");
}

#[tokio::test]
async fn large_and_empty_files_come_byte_for_byte() {
    let fixture = Fixture::new();
    let exactly_one_read = vec![b'x'; 64 * 1024];
    for (name, content) in [("large", large()), ("empty", Vec::new()), ("even", exactly_one_read)] {
        fixture.write(name, &content);
        let answer = get(&fixture, name, &[]).await;
        assert_eq!(answer.header("content-length"), content.len().to_string());
        assert!(answer.body == content, "{name}");
    }
}

#[tokio::test]
async fn a_range_is_served_from_small_and_large_files() {
    let fixture = Fixture::new();
    fixture.write("large", large());
    fixture.write("small", "0123456789");
    let cases = [
        ("small", "bytes=2-4", 2..5, "bytes 2-4/10"),
        ("small", "bytes=-3", 7..10, "bytes 7-9/10"),
        ("small", "bytes=8-", 8..10, "bytes 8-9/10"),
        ("small", "bytes=8-99", 8..10, "bytes 8-9/10"),
        ("large", "bytes=262143-600000", 262_143..600_001, "bytes 262143-600000/700001"),
        ("large", "bytes=700000-", 700_000..700_001, "bytes 700000-700000/700001"),
    ];
    for (name, range, expected, content_range) in cases {
        let content = std::fs::read(fixture.home.join(name)).unwrap();
        let answer = get(&fixture, name, &[("range", range), ("accept-encoding", "gzip")]).await;
        assert_eq!(
            (answer.status, answer.header("content-range")),
            (StatusCode::PARTIAL_CONTENT, content_range)
        );
        assert_eq!(answer.header("content-length"), expected.len().to_string());
        assert!(answer.body == content[expected], "{range}");
    }
}

#[tokio::test]
async fn ranges_that_cannot_be_served() {
    let fixture = Fixture::new();
    fixture.write("small", "0123456789");
    let answer = get(&fixture, "small", &[("range", "bytes=10-")]).await;
    assert_eq!(
        (answer.status, answer.header("content-range")),
        (StatusCode::RANGE_NOT_SATISFIABLE, "bytes */10")
    );
    assert!(answer.body.is_empty());
    // Several ranges would need a multipart answer; the whole file is right as well.
    let answer = get(&fixture, "small", &[("range", "bytes=0-1,4-5")]).await;
    assert_eq!((answer.status, answer.text()), (StatusCode::OK, "0123456789"));
}

#[tokio::test]
async fn a_range_of_an_empty_file_is_the_empty_file() {
    let fixture = Fixture::new();
    fixture.write("empty", "");
    let tag = get(&fixture, "empty", &[]).await.header("etag").to_owned();
    for range in ["bytes=0-", "bytes=0-0", "bytes=5-", "bytes=-5", "bytes=-0", "bytes=0-1,3-4"] {
        for condition in [&[][..], &[("if-range", tag.as_str())], &[("if-range", "\"other\"")]] {
            let answer = get(&fixture, "empty", &[&[("range", range)], condition].concat()).await;
            assert_eq!((answer.status, answer.body.len()), (StatusCode::OK, 0), "{range}");
            assert_eq!((answer.header("content-range"), answer.header("content-length")), ("", "0"));
        }
    }
}

#[tokio::test]
async fn a_client_that_holds_the_start_of_the_gzip_form_is_not_given_the_end_of_the_file() {
    let fixture = Fixture::new();
    fixture.write("f.txt", "0123456789");
    fixture.write("f.png", "0123456789");
    let packs = ("accept-encoding", "gzip");
    let (plain, packed) = (get(&fixture, "f.txt", &[]).await, get(&fixture, "f.txt", &[packs]).await);
    assert_eq!(packed.header("content-encoding"), "gzip");
    let (tag, packed_tag, date) =
        (plain.header("etag"), packed.header("etag"), plain.header("last-modified"));
    assert!(packed_tag != tag && packed_tag.starts_with('"') && packed_tag.ends_with('"'));
    let picture = get(&fixture, "f.png", &[packs]).await;
    assert_eq!(picture.header("content-encoding"), "");
    let range = ("range", "bytes=4-6");
    let digest = ("want-repr-digest", "sha-256=1");
    let cases: [(&str, Headers<'_>, u16); 9] = [
        ("f.txt", &[range, ("if-range", tag), packs], 206),
        ("f.txt", &[range, ("if-range", packed_tag)], 200),
        ("f.txt", &[range, ("if-range", packed_tag), packs], 200),
        ("f.txt", &[range, ("if-range", date)], 206),
        ("f.txt", &[range, ("if-range", date), packs], 200),
        ("f.txt", &[range, ("if-range", date), packs, digest], 206),
        ("f.png", &[range, ("if-range", picture.header("last-modified")), packs], 206),
        ("f.txt", &[range, ("if-match", packed_tag), packs], 412),
        ("f.txt", &[range, ("if-match", tag), packs], 206),
    ];
    for (name, headers, status) in cases {
        let answer = get(&fixture, name, headers).await;
        assert_eq!((answer.status.as_u16(), answer.header("content-encoding")), (status, ""), "{headers:?}");
        let content = match status {
            200 => "0123456789",
            206 => "456",
            _ => "",
        };
        assert_eq!(answer.text(), content, "{headers:?}");
    }
}

#[tokio::test]
async fn the_tag_of_either_form_tells_whether_the_file_has_changed() {
    let fixture = Fixture::new();
    fixture.write("f.txt", "0123456789");
    let packs = ("accept-encoding", "gzip");
    let (plain, packed) = (get(&fixture, "f.txt", &[]).await, get(&fixture, "f.txt", &[packs]).await);
    let (tag, packed_tag) = (plain.header("etag"), packed.header("etag"));
    let weak = format!("\"x\", W/{packed_tag}");
    let both = format!("{tag}, {packed_tag}");
    for (held, told) in [(tag, tag), (packed_tag, packed_tag), (&weak, packed_tag), (&both, tag)] {
        let answer = get(&fixture, "f.txt", &[("if-none-match", held), packs]).await;
        assert_eq!((answer.status, answer.header("etag")), (StatusCode::NOT_MODIFIED, told), "{held}");
    }
    for held in [tag, packed_tag, &both, "*"] {
        let answer = get(&fixture, "f.txt", &[("if-match", held), packs]).await;
        assert_eq!((answer.status, answer.text()), (StatusCode::OK, "0123456789"), "{held}");
    }
    fixture.write("f.txt", "changed");
    assert_eq!(get(&fixture, "f.txt", &[("if-none-match", packed_tag)]).await.text(), "changed");
    let answer = get(&fixture, "f.txt", &[("if-match", packed_tag)]).await;
    assert_eq!(answer.status, StatusCode::PRECONDITION_FAILED);
}

#[tokio::test]
async fn conditions_compare_the_date_and_the_tag() {
    let fixture = Fixture::new();
    fixture.write("f.txt", "0123456789");
    let fresh = get(&fixture, "f.txt", &[]).await;
    let (date, tag) = (fresh.header("last-modified"), fresh.header("etag"));
    for condition in [("if-modified-since", date), ("if-none-match", tag)] {
        let answer = get(&fixture, "f.txt", &[condition, ("accept-encoding", "gzip")]).await;
        assert_eq!((answer.status, answer.body.len()), (StatusCode::NOT_MODIFIED, 0));
    }
    let old = "Mon, 01 Jan 2001 00:00:00 GMT";
    let range = ("range", "bytes=0-3");
    for (validator, status) in [(date, 206), (tag, 206), (old, 200), ("\"other\"", 200)] {
        let answer = get(&fixture, "f.txt", &[range, ("if-range", validator)]).await;
        assert_eq!(answer.status.as_u16(), status, "{validator}");
    }
}

#[tokio::test]
async fn a_date_that_http_cannot_write_is_left_out() {
    let fixture = Fixture::new();
    let path = fixture.write("old.txt", "x");
    let before_1970 = SystemTime::UNIX_EPOCH - Duration::from_secs(100);
    File::options()
        .write(true)
        .open(path)
        .unwrap()
        .set_times(FileTimes::new().set_modified(before_1970))
        .unwrap();
    let answer = get(&fixture, "old.txt", &[]).await;
    assert_eq!((answer.status, answer.header("last-modified")), (StatusCode::OK, ""));
}

#[tokio::test]
async fn gzip_goes_to_those_who_prefer_it() {
    let fixture = Fixture::new();
    fixture.write("large.json", large());
    fixture.write("tiny.txt", "hi");
    for name in ["large.json", "tiny.txt"] {
        let answer = get(&fixture, name, &[("accept-encoding", "gzip, deflate")]).await;
        assert_eq!((answer.status, answer.header("content-encoding")), (StatusCode::OK, "gzip"));
        assert_eq!((answer.header("content-length"), answer.header("vary")), ("", "Accept-Encoding"));
        assert!(gunzip(&answer.body) == std::fs::read(fixture.home.join(name)).unwrap(), "{name}");
    }
}

#[tokio::test]
async fn compressed_content_is_compressed_again_only_on_demand() {
    let fixture = Fixture::new();
    fixture.write("p.png", large());
    let answer = get(&fixture, "p.png", &[("accept-encoding", "gzip")]).await;
    assert_eq!((answer.header("content-encoding"), answer.header("content-length")), ("", "700001"));
    let answer = get(&fixture, "p.png", &[("accept-encoding", "gzip, identity;q=0")]).await;
    assert_eq!(answer.header("content-encoding"), "gzip");
}

#[tokio::test]
async fn a_client_that_refuses_everything_gets_406() {
    let fixture = Fixture::new();
    fixture.write("f", "x");
    let answer = get(&fixture, "f", &[("accept-encoding", "identity;q=0")]).await;
    assert_eq!((answer.status, &answer.json()["code"]), (StatusCode::NOT_ACCEPTABLE, &json!(406)));
    assert_eq!(answer.header("vary"), "Accept-Encoding");
    let range = [("accept-encoding", "gzip, identity;q=0"), ("range", "bytes=0-0")];
    assert_eq!(get(&fixture, "f", &range).await.status, StatusCode::NOT_ACCEPTABLE);
}

#[tokio::test]
async fn files_that_lie_about_their_size_come_whole() {
    let fixture = Fixture::new();
    for path in ["/proc/self/status", "/proc/kallsyms", "/sys/kernel/mm/transparent_hugepage/enabled"] {
        let Ok(content) = std::fs::read(path) else { continue };
        for encoding in ["identity", "gzip"] {
            let answer = get(&fixture, path, &[("accept-encoding", encoding)]).await;
            let body = if encoding == "gzip" { gunzip(&answer.body) } else { answer.body };
            assert_eq!(answer.status, StatusCode::OK);
            // Counters change between two reads, the number of lines does not.
            let lines = |bytes: &[u8]| bytes.iter().filter(|byte| **byte == b'\n').count();
            assert_eq!(lines(&body), lines(&content), "{path} as {encoding}");
        }
    }
}

#[tokio::test]
async fn what_is_not_a_file_is_refused_in_json() {
    let fixture = Fixture::new();
    std::fs::create_dir(fixture.home.join("dir")).unwrap();
    fixture.write("file", "");
    fixture.fifo("pipe");
    fixture.link("pipe", "link-to-pipe");
    let _socket = UnixListener::bind(fixture.home.join("socket")).unwrap();
    let home = fixture.home.display();
    let cases = [
        ("missing", 404, format!("path '{home}/missing' does not exist")),
        ("file/below", 404, format!("path '{home}/file/below' does not exist")),
        ("dir", 400, format!("path '{home}/dir' is a directory")),
        ("", 400, format!("path '{home}' is a directory")),
        ("pipe", 400, format!("path '{home}/pipe' is not a regular file")),
        ("link-to-pipe", 400, format!("path '{home}/link-to-pipe' is not a regular file")),
        ("socket", 400, format!("path '{home}/socket' is not a regular file")),
        ("/dev/zero", 400, "path '/dev/zero' is not a regular file".to_owned()),
        ("~root/x", 400, "cannot expand user-specific home dir".to_owned()),
    ];
    for (path, status, message) in cases {
        let answer = get(&fixture, path, &[]).await;
        assert_eq!(answer.status.as_u16(), status, "{path}");
        assert_eq!(answer.json(), json!({ "code": status, "message": message }));
        assert_eq!(answer.header("x-content-type-options"), "nosniff");
    }
}

#[tokio::test]
async fn the_user_comes_from_the_query() {
    let fixture = Fixture::new();
    fixture.write("f", "x");
    let get = async |username: &str| {
        let request = Request::get(query(&[("path", "f"), ("username", username)]));
        send(&fixture, request.body(Body::empty()).unwrap()).await
    };
    assert_eq!(get("other").await.status, StatusCode::OK);
    assert_eq!(get("").await.status, StatusCode::OK);
    let answer = get("ghost").await;
    let message = "error looking up user 'ghost': user: unknown user ghost";
    assert_eq!(
        (answer.status, answer.json()),
        (StatusCode::UNAUTHORIZED, json!({ "code": 401, "message": message }))
    );
}

#[tokio::test]
async fn other_methods_are_not_allowed() {
    let fixture = Fixture::new();
    fixture.write("f", "x");
    for method in ["HEAD", "PUT", "DELETE"] {
        let request =
            Request::builder().method(method).uri(query(&[("path", "f")])).body(Body::empty()).unwrap();
        let answer = send(&fixture, request).await;
        assert_eq!((answer.status, answer.header("allow")), (StatusCode::METHOD_NOT_ALLOWED, "GET, POST"));
    }
}
