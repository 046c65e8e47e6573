//! Asks each call for the credential that the routes table names, and finds the user that it names.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use axum::extract::{Request, State};
use axum::http::request::Parts;
use axum::http::{HeaderMap, Method, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use connectrpc::{ConnectError, ErrorCode};
use guestd_protocol::errors::ErrorBody;
use guestd_protocol::files_query::FilesQuery;
use guestd_protocol::routes::{self, Credential};
use guestd_protocol::signature::{Operation, Signed};
use guestd_protocol::{ACCESS_TOKEN_HEADER, CONTROL_HEADER};

use super::{Access, Peer, Refusal};
use crate::identity::{Accounts, RequestUser, basic_user, basic_user_name};
use crate::services::refusal;

/// Refuses with 401 what lacks its credential.
pub async fn authorize(State(access): State<Arc<Access>>, request: Request, next: Next) -> Response {
    let (head, body) = request.into_parts();
    let checked = check(&access, &head).await;
    // What means nothing is told before who may, as in envd; a sealed agent tells nobody anything.
    let is_asked = checked != Err(Refusal::Sealed) && is_file_access(&head);
    let query = is_asked.then(|| FilesQuery::parse(head.uri.query().unwrap_or_default()));
    let request = Request::from_parts(head, body);
    if let Some(Err(error)) = query {
        let answer = (StatusCode::BAD_REQUEST, error.to_string()).into_response();
        return refusal::after_body(request, answer).await;
    }
    match checked {
        Ok(()) => next.run(request).await,
        Err(refusal) => refuse(request, refusal).await,
    }
}

/// Answers with the refusal after what the client is still sending.
pub async fn refuse(request: Request, refusal: Refusal) -> Response {
    let answer = match refusal {
        Refusal::Untold(_) => unable(&request, ErrorCode::ResourceExhausted, refusal.to_string()),
        _ => answer(refusal),
    };
    refusal::after_body(request, answer).await
}

async fn check(access: &Access, head: &Parts) -> Result<(), Refusal> {
    let path = head.uri.path();
    if access.is_sealed()
        && !matches!((path, &head.method), ("/health", &Method::GET) | ("/init", &Method::POST))
    {
        return Err(Refusal::Sealed);
    }
    let peer = head.extensions.get::<Peer>();
    match routes::find(path).map_or(Credential::AccessToken, |route| route.credential) {
        Credential::None | Credential::Init => Ok(()),
        Credential::Control => access.admit_host(bytes_of(&head.headers, CONTROL_HEADER), peer).await,
        Credential::AccessTokenOrSignature if is_file_access(head) => may_touch_file(access, head).await,
        Credential::AccessToken | Credential::AccessTokenOrSignature => {
            access.allows(bytes_of(&head.headers, ACCESS_TOKEN_HEADER), peer).await
        }
    }
}

/// Only reading and writing a file can be signed for (contract: envd.md section 5).
fn is_file_access(head: &Parts) -> bool {
    let route = routes::find(head.uri.path());
    route.is_some_and(|route| route.credential == Credential::AccessTokenOrSignature)
        && matches!(head.method, Method::GET | Method::POST)
}

/// Resolves the user that Basic auth names, for every route (contract: envd.md section 2.1).
pub async fn identify(State(accounts): State<Arc<Accounts>>, mut request: Request, next: Next) -> Response {
    let named = request
        .headers()
        .get(header::AUTHORIZATION)
        .and_then(|value| value.to_str().ok())
        .and_then(basic_user_name);
    let user = match named {
        None => None,
        Some(name) => match basic_user(&name, &accounts) {
            Ok(user) => Some(user),
            Err(error) => {
                let answer = unable(&request, error.code(), error.to_string());
                return refusal::after_body(request, answer).await;
            }
        },
    };
    request.extensions_mut().insert(RequestUser(user));
    next.run(request).await
}

fn bytes_of<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a [u8]> {
    headers.get(name).map(|value| value.as_bytes())
}

async fn may_touch_file(access: &Access, head: &Parts) -> Result<(), Refusal> {
    let (given, peer) = (bytes_of(&head.headers, ACCESS_TOKEN_HEADER), head.extensions.get::<Peer>());
    let Some(token) = access.access_token() else { return access.allows(None, peer).await };
    if given.is_some() {
        return access.allows(given, peer).await.map_err(|_wrong| Refusal::FileToken);
    }
    // What cannot be read is refused as such, whatever is said here.
    let Ok(query) = FilesQuery::parse(head.uri.query().unwrap_or_default()) else {
        return Err(Refusal::SignatureInvalid);
    };
    let operation = if head.method == Method::GET { Operation::Read } else { Operation::Write };
    let signature = query.signature.as_deref().ok_or(Refusal::SignatureMissing)?;
    let signed = Signed {
        path: query.path().unwrap_or_default(),
        operation,
        username: query.username().unwrap_or_default(),
        expiration: query.expiration.as_ref().map(|expiration| expiration.text.as_str()),
    };
    if !signed.matches(signature, &token) {
        return Err(Refusal::SignatureInvalid);
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs().cast_signed());
    match query.expiration {
        Some(expiration) if expiration.at < now => Err(Refusal::SignatureExpired),
        _ => Ok(()),
    }
}

/// The REST form of a refusal; SDKs map its status on Connect paths too.
pub fn answer(refusal: Refusal) -> Response {
    let body = ErrorBody { code: refusal.status().as_u16(), message: refusal.to_string() };
    (refusal.status(), axum::Json(body)).into_response()
}

/// Nobody to act for, or nobody knows for whom. A call of a service is told so in its own form. On the other routes a wrong name has the
/// Connect form, which the SDKs' clients read; what cannot be looked up is the machine's trouble and not the caller's.
fn unable(request: &Request, code: ErrorCode, text: String) -> Response {
    // A Connect path is /package.Service/Method.
    if request.uri().path().contains('.') {
        return refusal::failed(request, &ConnectError::new(code, text));
    }
    match code {
        ErrorCode::Unauthenticated => {
            let body = serde_json::json!({ "code": code.as_str(), "message": text });
            (StatusCode::UNAUTHORIZED, axum::Json(body)).into_response()
        }
        _ => {
            let status = if code == ErrorCode::ResourceExhausted { 503 } else { 500 };
            let status = StatusCode::from_u16(status).unwrap_or_default();
            (status, axum::Json(ErrorBody { code: status.as_u16(), message: text })).into_response()
        }
    }
}

#[cfg(test)]
mod tests {
    use tower::ServiceExt;

    use super::*;
    use crate::access::{Claim, Standing, Voucher};

    fn signed_access() -> Access {
        let access = Access::default();
        let claim = Claim {
            control: None,
            access_token: Some("secret"),
            standing: Standing::Trusted,
            voucher: Voucher::Absent,
        };
        access.initialise(claim).unwrap();
        access
    }

    async fn ask(access: &Access, uri: &str, method: Method) -> Result<(), Refusal> {
        let request = Request::builder().uri(uri).method(method).extension(Peer::Unix);
        super::check(access, &request.body(()).unwrap().into_parts().0).await
    }

    async fn check(uri: &str, method: Method) -> Result<(), Refusal> {
        ask(&signed_access(), uri, method).await
    }

    fn signed(path: &str, operation: Operation, expiration: Option<&str>) -> String {
        let signature = Signed { path: path.as_bytes(), operation, username: "", expiration }.sign("secret");
        let signature = signature.replace('+', "%2B").replace('/', "%2F");
        let expiration = expiration.map(|e| format!("&signature_expiration={e}")).unwrap_or_default();
        format!("/files?path={path}&signature={signature}{expiration}")
    }

    #[tokio::test]
    async fn a_signed_url_opens_what_it_was_signed_for_and_nothing_else() {
        assert_eq!(check(&signed("a.txt", Operation::Read, None), Method::GET).await, Ok(()));
        assert_eq!(
            check(&signed("a.txt", Operation::Read, None), Method::POST).await,
            Err(Refusal::SignatureInvalid)
        );
        assert_eq!(check("/files?path=a.txt", Method::GET).await, Err(Refusal::SignatureMissing));
        assert_eq!(
            check("/files?path=a.txt&signature=v1_x", Method::GET).await,
            Err(Refusal::SignatureInvalid)
        );
    }

    #[tokio::test]
    async fn an_expired_signature_says_so_and_an_unreadable_one_is_not_eternal() {
        assert_eq!(
            check(&signed("a", Operation::Read, Some("5")), Method::GET).await,
            Err(Refusal::SignatureExpired)
        );
        assert_eq!(
            check(&signed("a", Operation::Read, Some("-1")), Method::GET).await,
            Err(Refusal::SignatureExpired)
        );
        assert_eq!(
            check(&signed("a", Operation::Read, Some("never")), Method::GET).await,
            Err(Refusal::SignatureInvalid)
        );
        assert_eq!(check(&signed("a", Operation::Read, Some("99999999999")), Method::GET).await, Ok(()));
    }

    #[tokio::test]
    async fn a_query_that_means_nothing_is_400_whoever_asks() {
        let sealed = signed_access();
        sealed.seal();
        let far = Peer::tcp("192.0.2.1:5".parse().unwrap(), "192.0.2.2:1".parse().unwrap(), 1);
        let cases = [
            (signed_access(), Some("secret"), Peer::Unix, 400),
            (signed_access(), Some("wrong"), Peer::Unix, 400),
            (signed_access(), None, Peer::Unix, 400),
            (Access::default(), None, Peer::Unix, 400),
            (Access::default(), None, far, 400),
            (sealed, Some("secret"), Peer::Unix, 401),
        ];
        for (access, token, peer, status) in cases {
            let router = axum::Router::new().route("/files", axum::routing::any(async || "reached"));
            let layer = axum::middleware::from_fn_with_state(Arc::new(access), authorize);
            let router = router.layer(layer);
            for method in [Method::GET, Method::POST] {
                let mut request = Request::builder()
                    .method(method)
                    .uri("/files?path=a&signature_expiration=abc")
                    .extension(peer.clone());
                if let Some(token) = token {
                    request = request.header(ACCESS_TOKEN_HEADER, token);
                }
                let request = request.body(axum::body::Body::empty()).unwrap();
                let answer = tower::ServiceExt::oneshot(router.clone(), request).await.unwrap();
                assert_eq!(answer.status().as_u16(), status, "{token:?} {peer:?}");
                let kind = if status == 400 { "text/plain; charset=utf-8" } else { "application/json" };
                assert_eq!(answer.headers()[header::CONTENT_TYPE], kind);
            }
        }
    }

    #[tokio::test]
    async fn a_signature_for_one_name_opens_no_other_that_looks_the_same_as_text() {
        let signed = Signed { path: b"\xfe", operation: Operation::Read, username: "", expiration: None };
        let signature = signed.sign("secret").replace('+', "%2B").replace('/', "%2F");
        assert_eq!(check(&format!("/files?path=%fe&signature={signature}"), Method::GET).await, Ok(()));
        for path in ["%ff", "%ef%bf%bd"] {
            let uri = format!("/files?path={path}&signature={signature}");
            assert_eq!(check(&uri, Method::GET).await, Err(Refusal::SignatureInvalid), "{path}");
        }
    }

    #[tokio::test]
    async fn only_the_exempt_paths_are_open_without_the_token() {
        let access = signed_access();
        for (method, path) in [(Method::GET, "/health"), (Method::POST, "/init")] {
            assert_eq!(ask(&access, path, method).await, Ok(()), "{path}");
        }
        for (method, path) in [
            (Method::GET, "/metrics"),
            (Method::GET, "/envs"),
            (Method::GET, "/nowhere"),
            (Method::GET, "/Health"),
            (Method::GET, "/health/"),
            (Method::PUT, "/files"),
            (Method::POST, "/files/compose"),
            (Method::POST, "/process.Process/Start"),
        ] {
            assert_eq!(ask(&access, path, method).await, Err(Refusal::AccessToken), "{path}");
        }
    }

    #[tokio::test]
    async fn the_access_token_opens_no_control_path() {
        let access = Arc::new(signed_access());
        let layer = axum::middleware::from_fn_with_state(Arc::clone(&access), authorize);
        let router = axum::Router::new().fallback(async || "served").layer(layer);
        let paths = routes::ROUTES.iter().filter(|route| route.credential == Credential::Control);
        for path in paths.map(|route| route.path).chain(["/metrics"]) {
            let request = Request::post(path).extension(Peer::Unix).header(ACCESS_TOKEN_HEADER, "secret");
            let answer =
                router.clone().oneshot(request.body(axum::body::Body::empty()).unwrap()).await.unwrap();
            let expected = if path == "/metrics" { StatusCode::OK } else { StatusCode::UNAUTHORIZED };
            assert_eq!(answer.status(), expected, "{path}");
        }
    }

    #[tokio::test]
    async fn a_sealed_agent_answers_health_and_init_alone() {
        let access = signed_access();
        access.seal();
        assert_eq!(ask(&access, "/health", Method::GET).await, Ok(()));
        assert_eq!(ask(&access, "/init", Method::POST).await, Ok(()));
        for path in ["/metrics", "/files", "/freeze", "/process.Process/List"] {
            assert_eq!(ask(&access, path, Method::POST).await, Err(Refusal::Sealed), "{path}");
        }
    }
}
