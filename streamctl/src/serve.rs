//! `streamctl serve`: owns a data directory without a job, for other commands to reach it over TCP.
//!
//! Standard output carries one line, once requests are served: `listening on ADDRESS`, with the port that was taken
//! where it was given as 0. A supervisor waits for it.

use std::net::SocketAddr;
use std::path::Path;

use anyhow::{Context, Result, anyhow, bail};
use tidemill_broker::{Broker, DirError, Exposure, Intent, ServeError, ServeOptions, Serving};

use crate::exit::Usage;
use crate::stdout;
use crate::stop::Stop;
use crate::{chaos, cli};

/// Runs the command.
pub async fn run(dir: &Path, args: &cli::Serve, stop: &Stop) -> Result<()> {
    let listen = resolve(&args.listen).await?;
    let exposure = if args.insecure_listen { Exposure::Insecure } else { Exposure::Loopback };
    let mut options = ServeOptions { exposure, ..ServeOptions::new(Intent::Fill, listen) };
    options.log.probe = chaos::log_probe();
    let serving = tokio::select! {
        biased;
        serving = Serving::start(dir, options) => serving.map_err(explain)?,
        () = stop.wait() => {
            crate::note(format_args!("stopped before it served"));
            return Ok(());
        }
    };
    let topics = serving.broker().topics().await.map_or(0, |topics| topics.len());
    let address = serving.address();
    crate::note(format_args!(
        "serves {} ({topics} topics); `streamctl --broker {address} ...` reaches it; Ctrl-C ends it in order",
        dir.display()
    ));
    if !address.ip().is_loopback() {
        crate::note(format_args!(
            "warning: no authentication: whoever reaches {address} may read and delete every topic"
        ));
    }
    // Nobody has to read it: a supervisor that went away is no reason not to serve.
    if let Err(error) = stdout::line(format_args!("listening on {address}")) {
        tracing::debug!(%error, "the ready line was not read");
    }
    stop.wait().await;
    crate::note(format_args!("closes: answers what is in flight; Ctrl-C again ends it at once"));
    let drained = serving.close().await.map_err(|error| {
        anyhow!("{error}; nothing that was acknowledged is lost: the next start recovers it")
    })?;
    let dropped = match drained.cancelled {
        0 => String::new(),
        n => format!(", {n} that took too long were dropped"),
    };
    crate::note(format_args!("closed: {} requests in flight were answered{dropped}", drained.completed));
    Ok(())
}

/// `HOST:PORT`; a name may have several addresses, of which the first counts.
async fn resolve(text: &str) -> Result<SocketAddr> {
    if let Ok(address) = text.parse() {
        return Ok(address);
    }
    if text.rsplit_once(':').is_none_or(|(host, port)| host.is_empty() || port.parse::<u16>().is_err()) {
        return Err(Usage::error(format!(
            "--listen: expected HOST:PORT, such as 127.0.0.1:7070, not {text:?}"
        )));
    }
    let mut found = tokio::net::lookup_host(text).await.with_context(|| format!("--listen {text}"))?;
    match found.next() {
        Some(address) => Ok(address),
        None => bail!("--listen {text}: the name has no address"),
    }
}

fn explain(error: ServeError) -> anyhow::Error {
    match &error {
        ServeError::Dir(DirError::Missing { path }) => {
            anyhow!("{error}. An empty directory can be served as well: mkdir {}", path.display())
        }
        ServeError::Exposed { .. } => Usage::error(error.to_string()),
        _ => anyhow::Error::new(error),
    }
}
