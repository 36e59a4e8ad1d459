//! Ctrl-C and SIGTERM: the first asks for a clean stop, the second ends the process at once.

use std::io;
use std::sync::OnceLock;

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

/// Tells whether a clean stop was asked for.
#[derive(Debug, Clone)]
pub struct Stop(watch::Receiver<bool>);

/// The one of this process, for what every command waits for.
static INSTALLED: OnceLock<Stop> = OnceLock::new();

/// Returns once a stop is asked for; never where nobody listens to that. Cancel safe.
pub async fn asked() {
    match INSTALLED.get() {
        Some(stop) => stop.wait().await,
        None => std::future::pending().await,
    }
}

impl Stop {
    /// Takes over both signals. Called once, within the runtime.
    pub fn install() -> io::Result<Stop> {
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut terminate = signal(SignalKind::terminate())?;
        let (asked, receiver) = watch::channel(false);
        tokio::spawn(async move {
            loop {
                let code = tokio::select! {
                    _ = interrupt.recv() => 130,
                    _ = terminate.recv() => 143,
                };
                if asked.send_replace(true) {
                    std::process::exit(code);
                }
            }
        });
        Ok(INSTALLED.get_or_init(|| Stop(receiver)).clone())
    }

    /// Whether a stop was asked for already.
    pub fn asked(&self) -> bool {
        *self.0.borrow()
    }

    /// Returns once a stop is asked for. Cancel safe.
    pub async fn wait(&self) {
        let mut receiver = self.0.clone();
        if receiver.wait_for(|asked| *asked).await.is_err() {
            // The signal task lives as long as the runtime; without it no stop will come.
            std::future::pending::<()>().await;
        }
    }
}
