//! The Connect services as clients meet them.
//!
//! [`Services`] stands in front of them and does what all of them need: `media` tells which content types a method takes, `objects` refuses
//! JSON that is no message, `legacy` spares one old client what it cannot read, [`outlet`] is the short way of a stream's answer, and
//! [`pace`] is what a client asks of its stream: a deadline, which must be readable on every call, and keepalives. [`refusal`] is how a call
//! is refused that no service sees.

mod legacy;
mod media;
mod objects;
pub mod outlet;
pub mod pace;
pub mod refusal;

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};

use axum::body::Body;
use axum::http::{HeaderValue, Method, Request, Response, StatusCode, header};
use axum::response::IntoResponse;
use connectrpc::{ConnectRpcService, Dispatcher};
use futures_util::FutureExt;
use tower::Service;

use legacy::OldShape;
use objects::ObjectsOnly;
use outlet::Outlet;

/// One set of services for each kind of call, so that no call passes through what is not for it.
#[derive(Clone)]
pub struct Services {
    binary: ConnectRpcService,
    json: ConnectRpcService,
    old: ConnectRpcService,
    misspelt: ConnectRpcService,
}

impl Services {
    pub fn new(binary: ConnectRpcService) -> Self {
        let json = binary.clone().with_interceptor(ObjectsOnly);
        let old = json.clone().with_interceptor(OldShape);
        let misspelt = binary.clone().with_interceptor(pace::Refusal);
        Self { binary, json, old, misspelt }
    }

    /// What the called method takes instead of this request's content type. An unknown method is the services' to refuse.
    fn wanted(&self, request: &Request<Body>) -> Option<&'static str> {
        let path = request.uri().path();
        let method = self.binary.dispatcher().lookup(path.strip_prefix('/').unwrap_or(path))?;
        media::wanted(method.kind, request.headers())
    }
}

impl std::fmt::Debug for Services {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Services").finish_non_exhaustive()
    }
}

impl Service<Request<Body>> for Services {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, _cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, mut request: Request<Body>) -> Self::Future {
        media::normalise(request.headers_mut());
        if request.method() == Method::POST
            && let Some(wanted) = self.wanted(&request)
        {
            let answer = (StatusCode::UNSUPPORTED_MEDIA_TYPE, [("accept-post", wanted)]).into_response();
            return Box::pin(refusal::after_body(request, answer).map(Ok));
        }
        pace::drop_endless_deadline(request.headers_mut());
        let headers = request.headers();
        if pace::is_misspelt(headers) {
            let answer = self.misspelt.call(request);
            return Box::pin(answer.map(|answer| answer.map(|answer| answer.map(Body::new))));
        }
        if legacy::is_old(headers) {
            let answer = self.old.call(request).map(|answer| {
                answer.map(|mut answer| {
                    answer.headers_mut().insert(legacy::MARK, HeaderValue::from_static("true"));
                    answer.map(Body::new)
                })
            });
            return Box::pin(answer);
        }
        let outlet = Outlet::new(headers);
        let kind = headers.get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok());
        // What is not plainly binary may be JSON: a type with parameters, or the message in a query.
        let is_binary = kind.is_some_and(|kind| kind.ends_with("proto"));
        let services = if is_binary { &mut self.binary } else { &mut self.json };
        let Some(outlet) = outlet else {
            return Box::pin(services.call(request).map(|answer| answer.map(|answer| answer.map(Body::new))));
        };
        request.extensions_mut().insert(outlet.clone());
        let answer = services.call(request).map(move |answer| {
            answer.map(|answer| match outlet.body() {
                Some(body) => answer.map(|_empty| Body::new(body)),
                None => answer.map(Body::new),
            })
        });
        Box::pin(answer)
    }
}
