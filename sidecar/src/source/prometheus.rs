//! What a Prometheus has kept, by its HTTP API.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use ureq::tls::{Certificate, RootCerts, TlsConfig};
use ureq::{Agent, Error};

use crate::fleet::history::{ANSWER_BYTES_MAX, SLOTS, Series, series};

const PATIENCE: Duration = Duration::from_secs(20);

/// A span of time, and which node an `instance` label means.
pub struct Range<'a> {
    pub url: &'a str,
    /// Unix time.
    pub from: i64,
    pub to: i64,
    pub instances: &'a BTreeMap<String, String>,
}

impl Range<'_> {
    /// Seconds of one slot.
    pub fn step(&self) -> i64 {
        ((self.to - self.from) / SLOTS as i64).max(1)
    }

    /// The values of an expression, by the names of nodes.
    pub fn ask(&self, expression: &str) -> anyhow::Result<Series> {
        let host = self.url.split_once("://").map(|(scheme, _)| scheme);
        ensure!(
            matches!(host, Some("http" | "https")),
            "--prometheus takes a URL such as http://127.0.0.1:9090"
        );
        let url = format!("{}/api/v1/query_range", self.url.trim_end_matches('/'));
        let answer = agent()
            .get(&url)
            .query("query", expression)
            .query("start", self.from.to_string())
            .query("end", self.to.to_string())
            .query("step", self.step().to_string())
            .call();
        let read = answer.and_then(|mut answer| {
            answer.body_mut().with_config().limit(ANSWER_BYTES_MAX).lossy_utf8(true).read_to_string()
        });
        match read {
            Ok(text) => series(&text, self.instances).map_err(anyhow::Error::msg),
            Err(Error::BodyExceedsLimit(_)) => bail!("Prometheus answers more than {ANSWER_BYTES_MAX} bytes"),
            // The URL may have a password in it.
            Err(error) => Err(error).context("ask Prometheus"),
        }
    }
}

fn agent() -> Agent {
    let found = rustls_native_certs::load_native_certs().certs;
    let roots: Vec<Certificate<'static>> =
        found.iter().map(|der| Certificate::from_der(der).to_owned()).collect();
    let tls = TlsConfig::builder()
        .root_certs(RootCerts::new_with_certs(&roots))
        .unversioned_rustls_crypto_provider(std::sync::Arc::new(rustls::crypto::ring::default_provider()));
    let config = Agent::config_builder()
        .tls_config(tls.build())
        .max_redirects(0)
        .http_status_as_error(false)
        .timeout_global(Some(PATIENCE));
    config.build().new_agent()
}
