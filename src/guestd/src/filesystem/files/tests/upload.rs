//! Uploads.

use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};

use axum::body::Body;
use bytes::Bytes;
use futures_util::stream;
use http::{Request, StatusCode};
use serde_json::json;

use super::{Answer, gzip, query, send};
use crate::filesystem::entry::metadata;
use crate::filesystem::tests::{Fixture, has_attributes, is_root};

type Pair = (&'static str, &'static str);
type Pairs = &'static [Pair];

const OCTETS: Pair = ("content-type", "application/octet-stream");
const MULTIPART: Pair = ("content-type", "multipart/form-data; boundary=XX");
const GZIP: Pair = ("content-encoding", "gzip");

async fn post(
    fixture: &Fixture,
    pairs: &[(&str, &str)],
    headers: &[(&str, &str)],
    body: impl Into<Body>,
) -> Answer {
    let mut request = Request::post(query(pairs));
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    send(fixture, request.body(body.into()).unwrap()).await
}

/// A multipart body of parts of one field name, each with a file name.
fn parts(files: &[(&str, &str, &[u8])]) -> Vec<u8> {
    let mut body = Vec::new();
    for (field, name, content) in files {
        let disposition = format!("Content-Disposition: form-data; name=\"{field}\"; filename=\"{name}\"");
        body.extend(
            format!("--XX\r\n{disposition}\r\nContent-Type: application/octet-stream\r\n\r\n").bytes(),
        );
        body.extend_from_slice(content);
        body.extend(b"\r\n");
    }
    body.extend(b"--XX--\r\n");
    body
}

/// The same bytes in many pieces, so that every boundary is cut somewhere.
fn in_pieces(bytes: Vec<u8>, size: usize) -> Body {
    let pieces: Vec<_> =
        bytes.chunks(size).map(|piece| Ok::<_, std::io::Error>(Bytes::copy_from_slice(piece))).collect();
    Body::from_stream(stream::iter(pieces))
}

fn large() -> Vec<u8> {
    (0..900_001_u32).map(|number| (number % 253) as u8).collect()
}

#[tokio::test]
async fn octets_go_to_the_path_of_the_query() {
    let fixture = Fixture::new();
    let answer = post(&fixture, &[("path", "new/dir/f.bin")], &[OCTETS], "content").await;
    let path = fixture.home.join("new/dir/f.bin");
    let expected = json!([{ "path": path.to_str().unwrap(), "name": "f.bin", "type": "file" }]);
    assert_eq!((answer.status, answer.json()), (StatusCode::OK, expected));
    assert_eq!(std::fs::read(&path).unwrap(), b"content");
    assert_eq!(path.metadata().unwrap().mode() & 0o7777, 0o644);
    assert_eq!(path.parent().unwrap().metadata().unwrap().mode() & 0o7777, 0o755);
}

#[tokio::test]
async fn large_and_empty_bodies_arrive_byte_for_byte() {
    let fixture = Fixture::new();
    let path = fixture.write("f", "longer than nothing");
    for (body, content) in [(in_pieces(large(), 10_007), large()), (Body::empty(), Vec::new())] {
        assert_eq!(post(&fixture, &[("path", "f")], &[OCTETS], body).await.status, StatusCode::OK);
        assert!(std::fs::read(&path).unwrap() == content);
    }
}

#[tokio::test]
async fn file_names_of_a_multipart_body_keep_their_directories() {
    let fixture = Fixture::new();
    let absolute = fixture.home.join("abs/c.txt");
    let body = parts(&[
        ("file", "a.txt", b"A"),
        ("file", "deep/er/b.txt", b"B\r\n--X not a boundary"),
        ("file", absolute.to_str().unwrap(), b""),
        ("other", "ignored.txt", b"ignored"),
    ]);
    for size in [1, 7, 10_000] {
        let answer = post(&fixture, &[], &[MULTIPART], in_pieces(body.clone(), size)).await;
        assert_eq!(answer.status, StatusCode::OK, "{}", answer.text());
        let reply = answer.json();
        let names: Vec<_> =
            reply.as_array().unwrap().iter().map(|file| file["name"].as_str().unwrap()).collect();
        assert_eq!(names, ["a.txt", "b.txt", "c.txt"]);
        assert_eq!(std::fs::read(fixture.home.join("deep/er/b.txt")).unwrap(), b"B\r\n--X not a boundary");
        assert_eq!(std::fs::read(&absolute).unwrap(), b"");
        assert!(!fixture.home.join("ignored.txt").exists());
    }
}

#[tokio::test]
async fn names_that_are_no_text_are_files_of_their_own_in_both_directions() {
    use std::os::unix::ffi::OsStrExt as _;
    let fixture = Fixture::new();
    let disk = |byte: u8| fixture.home.join(std::ffi::OsStr::from_bytes(&[b'n', byte]));
    for byte in [0xfe, 0xff] {
        let request = Request::post(format!("/files?path=n%{byte:02x}")).header(OCTETS.0, OCTETS.1);
        let answer = send(&fixture, request.body(format!("{byte}").into()).unwrap()).await;
        assert_eq!(answer.status, StatusCode::OK, "{}", answer.text());
    }
    for byte in [0xfe, 0xff] {
        assert_eq!(std::fs::read_to_string(disk(byte)).unwrap(), format!("{byte}"));
        let request = Request::get(format!("/files?path=n%{byte:02x}"));
        assert_eq!(send(&fixture, request.body(Body::empty()).unwrap()).await.text(), format!("{byte}"));
    }
    let part = |byte: u8| {
        let mut body = parts(&[("file", "nX", &[byte])]);
        let place = body.iter().position(|byte| *byte == b'X').unwrap();
        // The first X is in the boundary.
        let place = place + body[place..].windows(2).position(|pair| pair == b"nX").unwrap() + 1;
        body[place] = byte;
        body.truncate(body.len() - b"--XX--\r\n".len());
        body
    };
    let body = [part(0xfe), part(0xff), b"--XX--\r\n".to_vec()].concat();
    let answer = post(&fixture, &[], &[MULTIPART], body).await;
    assert_eq!(answer.status, StatusCode::OK, "{}", answer.text());
    assert_eq!(
        (std::fs::read(disk(0xfe)).unwrap(), std::fs::read(disk(0xff)).unwrap()),
        (vec![0xfe], vec![0xff])
    );
}

#[tokio::test]
async fn a_query_that_means_nothing_is_refused_before_anything_is_written() {
    let fixture = Fixture::new();
    for query in ["path=f&path=f", "path=f&username=%ff", "path=f&signature_expiration=abc"] {
        let request = Request::post(format!("/files?{query}")).header(OCTETS.0, OCTETS.1);
        let answer = send(&fixture, request.body("x".into()).unwrap()).await;
        assert_eq!(answer.status, StatusCode::BAD_REQUEST, "{query}");
        assert_eq!(answer.header("content-type"), "text/plain; charset=utf-8");
        assert!(answer.text().starts_with("query parameter '"), "{}", answer.text());
    }
    assert!(!fixture.home.join("f").exists());
}

#[tokio::test]
async fn the_path_of_the_query_wins_over_the_file_name() {
    let fixture = Fixture::new();
    let mixed = ("content-type", "multipart/mixed; boundary=\"XX\"");
    for headers in [MULTIPART, mixed] {
        let answer =
            post(&fixture, &[("path", "chosen")], &[headers], parts(&[("file", "named", b"x")])).await;
        assert_eq!(answer.json()[0]["name"], "chosen");
    }
    assert!(fixture.home.join("chosen").exists() && !fixture.home.join("named").exists());
}

#[tokio::test]
async fn a_large_part_streams_through() {
    let fixture = Fixture::new();
    let body = in_pieces(parts(&[("skip", "s", &large()), ("file", "big", &large())]), 65_536);
    assert_eq!(post(&fixture, &[], &[MULTIPART], body).await.status, StatusCode::OK);
    assert!(std::fs::read(fixture.home.join("big")).unwrap() == large());
}

#[tokio::test]
async fn gzip_is_decoded_in_both_kinds_of_body() {
    let fixture = Fixture::new();
    let answer = post(&fixture, &[("path", "o")], &[OCTETS, GZIP], in_pieces(gzip(&large()), 1000)).await;
    assert_eq!(answer.status, StatusCode::OK, "{}", answer.text());
    assert!(std::fs::read(fixture.home.join("o")).unwrap() == large());
    let body = gzip(&parts(&[("file", "m", &large())]));
    let answer = post(&fixture, &[], &[MULTIPART, GZIP], in_pieces(body, 1000)).await;
    assert_eq!(answer.status, StatusCode::OK, "{}", answer.text());
    assert!(std::fs::read(fixture.home.join("m")).unwrap() == large());
}

#[tokio::test]
async fn every_member_of_a_gzip_body_arrives_and_what_follows_the_last_one_is_refused() {
    let fixture = Fixture::new();
    let body = |tail: &[u8]| [gzip(b"one"), gzip(b""), gzip(&large()), tail.to_vec()].concat();
    let content = [b"one".to_vec(), large()].concat();
    for (encoding, size) in [("gzip", 1), ("GZIP", 7), ("GZip", 1 << 20)] {
        let headers = [OCTETS, ("content-encoding", encoding)];
        let answer = post(&fixture, &[("path", "o")], &headers, in_pieces(body(b""), size)).await;
        assert_eq!(answer.status, StatusCode::OK, "{}", answer.text());
        assert!(std::fs::read(fixture.home.join("o")).unwrap() == content);
    }
    let path = fixture.write("kept", "old");
    let atomic = [OCTETS, GZIP, ("guestd-replace", "atomic")];
    for tail in [&b"\x1f"[..], b"\0", b"\n", b"garbage", &gzip(b"cut")[..15]] {
        let answer = post(&fixture, &[("path", "kept")], &atomic, body(tail)).await;
        assert_eq!(answer.status, StatusCode::BAD_REQUEST, "{tail:?}");
        assert!(answer.text().contains("the body is not valid gzip"), "{}", answer.text());
        assert_eq!(std::fs::read(&path).unwrap(), b"old");
    }
}

#[tokio::test]
async fn a_multipart_body_may_be_in_several_gzip_members() {
    let fixture = Fixture::new();
    let plain = parts(&[("file", "m", &large())]);
    let (start, end) = plain.split_at(plain.len() - 3);
    let body = [gzip(start), gzip(end)].concat();
    let answer = post(&fixture, &[], &[MULTIPART, GZIP], in_pieces(body, 1000)).await;
    assert_eq!(answer.status, StatusCode::OK, "{}", answer.text());
    assert!(std::fs::read(fixture.home.join("m")).unwrap() == large());
}

#[tokio::test]
async fn a_gzip_bomb_passes_through_in_small_pieces() {
    let fixture = Fixture::new();
    let answer =
        post(&fixture, &[], &[MULTIPART, GZIP], gzip(&parts(&[("file", "zeros", &vec![0; 32 << 20])]))).await;
    assert_eq!(answer.status, StatusCode::OK, "{}", answer.text());
    assert_eq!(fixture.home.join("zeros").metadata().unwrap().len(), 32 << 20);
}

#[tokio::test]
async fn bad_encodings_are_the_clients_fault_and_leave_the_file_alone() {
    let fixture = Fixture::new();
    let path = fixture.write("f", "old");
    for (encoding, body) in
        [("gzip", b"not gzip at all".to_vec()), ("gzip", vec![]), ("br", vec![1]), ("gzip, gzip", gzip(b"x"))]
    {
        let answer = post(&fixture, &[("path", "f")], &[OCTETS, ("content-encoding", encoding)], body).await;
        assert_eq!(answer.status, StatusCode::BAD_REQUEST, "{encoding}");
        assert_eq!(answer.json()["code"], 400);
        assert_eq!(std::fs::read(&path).unwrap(), b"old");
    }
    let cut = gzip(&large());
    let answer = post(&fixture, &[("path", "f")], &[OCTETS, GZIP], cut[..cut.len() / 2].to_vec()).await;
    assert_eq!(answer.status, StatusCode::BAD_REQUEST, "{}", answer.text());
    let cut = gzip(&parts(&[("file", "m", b"x")]));
    let answer = post(&fixture, &[], &[MULTIPART, GZIP], cut[..cut.len() - 12].to_vec()).await;
    assert_eq!(answer.status, StatusCode::BAD_REQUEST, "{}", answer.text());
    let answer = post(&fixture, &[("path", "f")], &[OCTETS, ("content-encoding", "identity")], "new").await;
    assert_eq!(answer.status, StatusCode::OK);
}

#[tokio::test]
async fn requests_that_mean_nothing_are_refused() {
    let fixture = Fixture::new();
    std::fs::create_dir(fixture.home.join("dir")).unwrap();
    fixture.write("file", "x");
    let one = || parts(&[("file", "", b"x")]);
    let twice = parts(&[("file", "a", b"1"), ("file", "./b/../a", b"2")]);
    let cases: [(Pairs, Pair, Vec<u8>, &str); 12] = [
        (&[], OCTETS, vec![], "an upload of application/octet-stream needs the query parameter 'path'"),
        (&[("path", "p")], ("content-type", "text/plain"), vec![], "unsupported content type: text/plain"),
        (&[("path", "p")], ("x-none", ""), vec![], "unsupported content type: "),
        (&[], MULTIPART, one(), "a part named 'file' has no filename, and the query has no 'path'"),
        (&[], MULTIPART, twice, "is given twice in one upload"),
        (&[("path", "dir")], OCTETS, vec![], "is a directory"),
        (&[("path", "/")], OCTETS, vec![], "is a directory"),
        (&[("path", "~root/x")], OCTETS, vec![], "cannot expand user-specific home dir"),
        (&[("path", "file/below")], OCTETS, vec![], "cannot make the directory of"),
        (&[("path", "/dev/null")], OCTETS, vec![], "path '/dev/null' is not a regular file"),
        (&[], MULTIPART, b"--XX\r\nContent-Disposition: form-data".to_vec(), "malformed multipart body"),
        (&[], ("content-type", "multipart/form-data"), vec![], "malformed multipart body"),
    ];
    for (pairs, content_type, body, message) in cases {
        let answer = post(&fixture, pairs, &[content_type], body).await;
        assert_eq!(answer.status, StatusCode::BAD_REQUEST, "{message}: {}", answer.text());
        let reply = answer.json();
        assert!(reply["message"].as_str().unwrap().contains(message), "{message}: {reply}");
    }
}

#[tokio::test]
async fn a_pipe_as_the_target_does_not_block() {
    let fixture = Fixture::new();
    let pipe = fixture.fifo("pipe");
    let answer = post(&fixture, &[("path", "pipe")], &[OCTETS], "x").await;
    assert_eq!(answer.status, StatusCode::BAD_REQUEST);
    // With somebody at the other end the open would succeed.
    let _reader = std::fs::OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(&pipe).unwrap();
    let answer = post(&fixture, &[("path", "pipe")], &[OCTETS], "x").await;
    assert_eq!(answer.status, StatusCode::BAD_REQUEST);
    let message = format!("path '{}' is not a regular file", pipe.display());
    assert_eq!(answer.json(), json!({ "code": 400, "message": message }));
}

#[tokio::test]
async fn part_headers_without_an_end_do_not_fill_memory() {
    let fixture = Fixture::new();
    let endless =
        stream::iter((0..10_000).map(|_| Ok::<_, std::io::Error>(Bytes::from(vec![b'a'; 64 * 1024]))));
    let head = stream::iter([Ok(Bytes::from_static(b"--XX\r\nContent-Disposition: "))]);
    let body = Body::from_stream(futures_util::StreamExt::chain(head, endless));
    let answer = post(&fixture, &[], &[MULTIPART], body).await;
    assert_eq!(answer.status, StatusCode::BAD_REQUEST);
    assert!(answer.text().contains("without a boundary"), "{}", answer.text());
}

#[tokio::test]
async fn metadata_is_stored_shown_and_replaced() {
    let fixture = Fixture::new();
    if !has_attributes(&fixture.home) {
        return;
    }
    let path = fixture.home.join("f");
    let headers = [OCTETS, ("X-Metadata-Author", "ada"), ("x-metadata-kind", "a b")];
    let answer = post(&fixture, &[("path", "f")], &headers, "x").await;
    assert_eq!(answer.json()[0]["metadata"], json!({ "author": "ada", "kind": "a b" }));
    assert_eq!(metadata(&path).len(), 2);
    post(&fixture, &[("path", "f")], &[OCTETS, ("x-metadata-kind", "c")], "x").await;
    assert_eq!(metadata(&path), [("kind".to_owned(), "c".to_owned())].into());
    post(&fixture, &[("path", "f")], &[OCTETS], "x").await;
    assert!(metadata(&path).is_empty());
}

#[tokio::test]
async fn bad_metadata_is_refused_before_anything_is_written() {
    let fixture = Fixture::new();
    let headers = [OCTETS, ("x-metadata-k", "tab\there")];
    assert_eq!(post(&fixture, &[("path", "f")], &headers, "x").await.status, StatusCode::BAD_REQUEST);
    assert!(!fixture.home.join("f").exists());
}

#[tokio::test]
async fn what_is_created_belongs_to_the_user_and_what_is_overwritten_stays_its_owners() {
    let fixture = Fixture::new();
    if !is_root() {
        return;
    }
    let owner = |path: &str| {
        let metadata = fixture.home.join(path).metadata().unwrap();
        (metadata.uid(), metadata.gid())
    };
    fixture.mode("", 0o777);
    fixture.write("open", "x");
    fixture.mode("open", 0o666);
    fixture.write("closed", "x");
    let post =
        async |path: &str| post(&fixture, &[("path", path), ("username", "other")], &[OCTETS], "new").await;
    assert_eq!(post("new/f").await.status, StatusCode::OK);
    assert_eq!((owner("new"), owner("new/f"), owner("")), ((12345, 12346), (12345, 12346), (0, 0)));
    assert_eq!(post("open").await.status, StatusCode::OK);
    assert_eq!(owner("open"), (0, 0));
    let refused = post("closed").await;
    assert_eq!(refused.status, StatusCode::FORBIDDEN);
    let message = format!("user 'other' may not open '{}/closed': Permission denied", fixture.home.display());
    assert!(refused.json()["message"].as_str().unwrap().starts_with(&message), "{}", refused.text());
    assert_eq!(std::fs::read(fixture.home.join("closed")).unwrap(), b"x");
}

#[tokio::test]
async fn a_planted_link_gives_a_user_no_more_than_its_own_rights() {
    let fixture = Fixture::new();
    if !is_root() {
        return;
    }
    let secret = fixture.write("root-only", "old");
    fixture.link("root-only", "out.txt");
    fixture.link("/proc/self/fd/0", "agents-own");
    for path in ["out.txt", "agents-own"] {
        let pairs = [("path", path), ("username", "other")];
        let answer = post(&fixture, &pairs, &[OCTETS], "new").await;
        assert!(answer.status.is_client_error(), "{path}: {}", answer.status);
    }
    assert_eq!((secret.metadata().unwrap().uid(), std::fs::read(&secret).unwrap()), (0, b"old".to_vec()));
}

#[tokio::test]
async fn an_existing_file_keeps_its_inode_and_mode() {
    let fixture = Fixture::new();
    let path = fixture.write("f", "a longer content than the new one");
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o751)).unwrap();
    let before = path.metadata().unwrap();
    post(&fixture, &[("path", "f")], &[OCTETS], "new").await;
    let after = path.metadata().unwrap();
    assert_eq!((before.ino(), before.mode()), (after.ino(), after.mode()));
    assert_eq!(std::fs::read(&path).unwrap(), b"new");
}

#[tokio::test]
async fn a_body_that_breaks_off_is_an_error_and_not_a_short_file() {
    let fixture = Fixture::new();
    let broken = || {
        let pieces = [Ok(Bytes::from_static(
            b"--XX\r\nContent-Disposition: form-data; name=\"file\"; filename=\"m\"\r\n\r\nhalf",
        ))];
        Body::from_stream(futures_util::StreamExt::chain(
            stream::iter(pieces),
            stream::iter([Err("reset by peer")]),
        ))
    };
    for (pairs, kind) in [(&[("path", "f")][..], OCTETS), (&[][..], MULTIPART)] {
        let answer = post(&fixture, pairs, &[kind], broken()).await;
        assert_eq!(answer.status, StatusCode::BAD_REQUEST);
        assert!(answer.text().contains("the request body broke off"), "{}", answer.text());
    }
}

#[tokio::test]
async fn a_gzip_body_that_breaks_off_is_not_called_bad_gzip() {
    let fixture = Fixture::new();
    let packed = gzip(&large());
    for length in [0, 5, packed.len() / 2, packed.len()] {
        let pieces = [Ok(Bytes::copy_from_slice(&packed[..length])), Err("reset by peer")];
        let body = Body::from_stream(stream::iter(pieces));
        let answer = post(&fixture, &[("path", "f")], &[OCTETS, GZIP], body).await;
        assert_eq!((answer.status, answer.header("connection")), (StatusCode::BAD_REQUEST, "close"));
        assert!(answer.text().contains("the request body broke off"), "{}", answer.text());
    }
}

#[tokio::test]
async fn a_refused_upload_is_read_to_its_end_so_that_the_answer_arrives() {
    let fixture = Fixture::new();
    let headers = [&[OCTETS][..], &[MULTIPART], &[OCTETS, GZIP], &[("content-type", "text/plain")]];
    for headers in headers {
        let (sender, read) = std::sync::mpsc::channel();
        let pieces = (0..50).map(move |number| {
            sender.send(number).unwrap();
            Ok::<_, std::io::Error>(Bytes::from_static(b"--neither a boundary nor gzip"))
        });
        let answer = post(&fixture, &[("path", "/")], headers, Body::from_stream(stream::iter(pieces))).await;
        assert_eq!(answer.status, StatusCode::BAD_REQUEST, "{headers:?}");
        assert_eq!(read.iter().count(), 50, "{headers:?}");
    }
}

#[tokio::test]
async fn a_multipart_body_is_read_behind_its_last_boundary_so_that_the_connection_can_be_used_again() {
    let fixture = Fixture::new();
    let head = Bytes::from_static(
        b"--XX\r\nContent-Disposition: form-data; name=\"file\"; filename=\"m\"\r\n\r\nx\r\n--XX--",
    );
    let packed = |bytes: &[u8]| Bytes::from(gzip(bytes));
    let flipped = |bytes: &[u8]| {
        let mut packed = gzip(bytes);
        let checksum = packed.len() - 8;
        packed[checksum] ^= 1;
        Bytes::from(packed)
    };
    let most = Bytes::from(vec![b'.'; 4 << 20]);
    let cases: [(&[Pair], Vec<Bytes>, u16); 6] = [
        (&[MULTIPART], vec![head.clone(), Bytes::from_static(b"\r\n")], 200),
        (&[MULTIPART], vec![head.clone(), Bytes::from_static(b"\r\na trailer"), most.slice(100..)], 200),
        (&[MULTIPART], [vec![head.clone()], vec![most; 4]].concat(), 400),
        (&[MULTIPART, GZIP], vec![packed(&head), packed(b"\r\n")], 200),
        (&[MULTIPART, GZIP], vec![flipped(&head)], 400),
        (&[MULTIPART, GZIP], vec![packed(&head), Bytes::from_static(b"garbage")], 400),
    ];
    for (headers, pieces, status) in cases {
        let (sender, ended) = std::sync::mpsc::channel();
        let end = stream::once(async move {
            // The end of the body comes late, as it does over a network.
            tokio::task::yield_now().await;
            sender.send(()).unwrap();
            Ok(Bytes::new())
        });
        let pieces = stream::iter(pieces.into_iter().map(Ok::<_, std::io::Error>));
        let body = Body::from_stream(Box::pin(futures_util::StreamExt::chain(pieces, end)));
        let answer = post(&fixture, &[], headers, body).await;
        assert_eq!(answer.status.as_u16(), status, "{}", answer.text());
        assert_eq!((ended.iter().count(), answer.header("connection")), (1, ""));
    }
}

/// A body that sends this much and then keeps the connection open.
fn stalling(start: &'static [u8]) -> Body {
    let start = stream::iter([Ok::<_, std::io::Error>(Bytes::from_static(start))]);
    Body::from_stream(futures_util::StreamExt::chain(start, stream::pending()))
}

#[tokio::test(start_paused = true)]
async fn a_client_that_sends_nothing_for_a_minute_loses_its_upload() {
    let fixture = Fixture::new();
    let part = b"--XX\r\nContent-Disposition: form-data; name=\"file\"; filename=\"m\"\r\n\r\nhalf";
    let whole = b"--XX\r\nContent-Disposition: form-data; name=\"file\"; filename=\"m\"\r\n\r\nx\r\n--XX--";
    let cases: [(Pairs, Pair, &'static [u8]); 4] = [
        (&[("path", "o")], OCTETS, b"half"),
        (&[("path", "o")], OCTETS, b""),
        (&[], MULTIPART, part),
        (&[], MULTIPART, whole),
    ];
    for (pairs, kind, start) in cases {
        for atomic in [&[kind][..], &[kind, ("guestd-replace", "atomic")]] {
            let mut request = Request::post(query(pairs));
            for (name, value) in atomic {
                request = request.header(*name, *value);
            }
            let began = tokio::time::Instant::now();
            let router = crate::filesystem::routes(std::sync::Arc::clone(&fixture.filesystem));
            let answer =
                tower::ServiceExt::oneshot(router, request.body(stalling(start)).unwrap()).await.unwrap();
            assert_eq!(answer.status(), StatusCode::REQUEST_TIMEOUT);
            assert_eq!(answer.headers()["connection"], "close");
            let waited = began.elapsed().as_secs();
            assert!((60..62).contains(&waited), "{waited}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_client_that_sends_a_little_every_50_seconds_is_slow_and_not_stalled() {
    let fixture = Fixture::new();
    let pieces = stream::unfold(0, async |number| {
        tokio::time::sleep(std::time::Duration::from_secs(50)).await;
        (number < 5).then_some((Ok::<_, std::io::Error>(Bytes::from_static(b"x")), number + 1))
    });
    let request = Request::post(query(&[("path", "slow")])).header(OCTETS.0, OCTETS.1);
    let router = crate::filesystem::routes(std::sync::Arc::clone(&fixture.filesystem));
    let body = Body::from_stream(Box::pin(pieces));
    let answer = tower::ServiceExt::oneshot(router, request.body(body).unwrap()).await.unwrap();
    assert_eq!(answer.status(), StatusCode::OK);
    assert_eq!(std::fs::read(fixture.home.join("slow")).unwrap(), b"xxxxx");
}
