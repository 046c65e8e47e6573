//! The Connect services as clients meet them.
//!
//! [`Services`] stands in front of them and does what all of them need: `objects` refuses JSON that is no message, `legacy` spares one old
//! client what it cannot read, and [`pace`] is what a client asks of its stream: a deadline, and keepalives.

mod legacy;
mod objects;
pub mod pace;

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};

use axum::body::Body;
use axum::http::{HeaderValue, Request, Response, header};
use connectrpc::{ConnectRpcBody, ConnectRpcService};
use futures_util::FutureExt;
use tower::Service;

use legacy::OldShape;
use objects::ObjectsOnly;

/// One set of services for each kind of call, so that no call passes through what is not for it.
#[derive(Clone)]
pub struct Services {
    binary: ConnectRpcService,
    json: ConnectRpcService,
    old: ConnectRpcService,
}

impl Services {
    pub fn new(binary: ConnectRpcService) -> Self {
        let json = binary.clone().with_interceptor(ObjectsOnly);
        let old = json.clone().with_interceptor(OldShape);
        Self { binary, json, old }
    }
}

impl std::fmt::Debug for Services {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Services").finish_non_exhaustive()
    }
}

impl Service<Request<Body>> for Services {
    type Response = Response<ConnectRpcBody>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, _cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, mut request: Request<Body>) -> Self::Future {
        pace::drop_endless_deadline(request.headers_mut());
        let headers = request.headers();
        if legacy::is_old(headers) {
            let answer = self.old.call(request).map(|answer| {
                answer.map(|mut answer| {
                    answer.headers_mut().insert(legacy::MARK, HeaderValue::from_static("true"));
                    answer
                })
            });
            return Box::pin(answer);
        }
        let kind = headers.get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok());
        // What is not plainly binary may be JSON: a type with parameters, or the message in a query.
        if kind.is_some_and(|kind| kind.ends_with("proto")) {
            self.binary.call(request)
        } else {
            self.json.call(request)
        }
    }
}
