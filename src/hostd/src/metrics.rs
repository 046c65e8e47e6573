//! Prometheus metrics of the supervisor.

use std::time::Duration;

use guestd_idle::{EndReason, HoldClass};
use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

/// Upper bounds of the time to create, in seconds: a warm clone, a KVM boot, an emulated boot, a struggling host.
const CREATE_BUCKETS: [f64; 9] = [0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0];

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReasonLabel {
    reason: Reason,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Reason(EndReason);

impl EncodeLabelValue for Reason {
    fn encode(
        &self,
        encoder: &mut prometheus_client::encoding::LabelValueEncoder<'_>,
    ) -> Result<(), std::fmt::Error> {
        self.0.name().encode(encoder)
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct HoldLabel {
    class: String,
    side: String,
}

#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    pub running: Gauge,
    pub failed: Counter,
    ended: Family<ReasonLabel, Counter>,
    created: Histogram,
    holds: Family<HoldLabel, Gauge>,
    notices: Counter,
}

impl Default for Metrics {
    fn default() -> Self {
        let mut registry = Registry::with_prefix("hostd");
        let running = Gauge::default();
        registry.register("sandboxes_running", "Sandboxes alive now", running.clone());
        let failed = Counter::default();
        registry.register("sandbox_creates_failed", "Sandboxes that did not come up", failed.clone());
        let ended = Family::<ReasonLabel, Counter>::default();
        registry.register("sandboxes_ended", "Sandboxes that ended, by reason", ended.clone());
        for reason in EndReason::ALL {
            // So that a rate over a reason that never happened is zero, not absent.
            drop(ended.get_or_create(&ReasonLabel { reason: Reason(reason) }));
        }
        let created = Histogram::new(CREATE_BUCKETS);
        registry.register(
            "sandbox_create_seconds",
            "From a create call to its sandbox being ready",
            created.clone(),
        );
        let holds = Family::<HoldLabel, Gauge>::default();
        registry.register("holds", "Live holds, by class and by the side that knows of them", holds.clone());
        let notices = Counter::default();
        registry.register("notices", "Sandboxes that were told of their end", notices.clone());
        Self { registry, running, failed, ended, created, holds, notices }
    }
}

impl Metrics {
    fn gauge(&self, class: &str, side: &str) -> Gauge {
        let label = HoldLabel { class: class.to_owned(), side: side.to_owned() };
        self.holds.get_or_create(&label).clone()
    }

    pub fn ended(&self, reason: EndReason) {
        self.ended.get_or_create(&ReasonLabel { reason: Reason(reason) }).inc();
    }

    pub fn created(&self, took: Duration) {
        self.created.observe(took.as_secs_f64());
    }

    pub fn noticed(&self) {
        self.notices.inc();
    }

    /// The text that a Prometheus server scrapes. `holds` are those of all sandboxes, as class and side.
    pub fn text<'a>(&self, holds: impl Iterator<Item = (&'a str, &'a str)>) -> String {
        for class in HoldClass::ALL {
            for side in ["host", "guest"] {
                self.gauge(class.name(), side).set(0);
            }
        }
        for (class, side) in holds {
            // A guest may call its holds anything; only the known classes become labels.
            if let Some(class) = HoldClass::from_name(class) {
                self.gauge(class.name(), side).inc();
            }
        }
        let mut text = String::new();
        // Writing to a string cannot fail.
        let _infallible = encode(&mut text, &self.registry);
        text
    }
}
