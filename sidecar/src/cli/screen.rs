//! A terminal that a live view has for itself, and gives back as it was, however it ends.

use std::io::{self, Write as _};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::Context as _;
use ratatui::crossterm::event::{self, Event as Input, KeyCode, KeyEventKind, KeyModifiers};
use ratatui::crossterm::{cursor, execute, terminal};

/// How long the terminal may wait for a key, and everything else for us.
pub const TICK: Duration = Duration::from_millis(100);

/// The terminal while it is ours. Given back when dropped, and before a panic is told.
pub struct Screen {
    stop: Arc<AtomicBool>,
}

/// What whoever looks at it wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wish {
    None,
    /// It has another size now.
    Redraw,
    End,
}

impl Screen {
    pub fn open() -> anyhow::Result<Self> {
        let stop = stop_on_signals()?;
        let told = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            give_back();
            told(panic);
        }));
        terminal::enable_raw_mode().context("set up the terminal")?;
        let screen = Self { stop };
        // A line that is too long ends at the edge.
        execute!(io::stdout(), terminal::EnterAlternateScreen, terminal::DisableLineWrap, cursor::Hide)
            .context("set up the terminal")?;
        Ok(screen)
    }

    /// Waits for a key, a signal or another size, but no longer than this and [`TICK`].
    pub fn wait(&mut self, most: Duration) -> anyhow::Result<Wish> {
        let came = event::poll(most.min(TICK)).context("wait for a key")?;
        if self.stop.load(Ordering::Relaxed) {
            return Ok(Wish::End);
        }
        if !came {
            return Ok(Wish::None);
        }
        Ok(match event::read().context("read a key")? {
            Input::Key(key) if key.kind == KeyEventKind::Press => match key.code {
                KeyCode::Char('q' | 'Q') | KeyCode::Esc => Wish::End,
                KeyCode::Char('c') if key.modifiers.contains(KeyModifiers::CONTROL) => Wish::End,
                _ => Wish::None,
            },
            Input::Resize(..) => Wish::Redraw,
            _ => Wish::None,
        })
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        give_back();
    }
}

fn give_back() {
    let _ = execute!(io::stdout(), terminal::EnableLineWrap, terminal::LeaveAlternateScreen, cursor::Show);
    let _ = terminal::disable_raw_mode();
    let _ = io::stdout().flush();
}

/// Set by SIGTERM, SIGHUP and a SIGINT that is no key.
fn stop_on_signals() -> anyhow::Result<Arc<AtomicBool>> {
    use tokio::signal::unix::{SignalKind, signal};
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let stop = Arc::new(AtomicBool::new(false));
    let set = Arc::clone(&stop);
    // Handlers before anything is done to the terminal.
    let mut signals = {
        let _inside = runtime.enter();
        [SignalKind::terminate(), SignalKind::hangup(), SignalKind::interrupt()]
            .map(signal)
            .into_iter()
            .collect::<io::Result<Vec<_>>>()
            .context("handle signals")?
    };
    std::thread::spawn(move || {
        runtime.block_on(async {
            let [terminate, hangup, interrupt] = &mut signals[..] else { return };
            tokio::select! { _ = terminate.recv() => {}, _ = hangup.recv() => {}, _ = interrupt.recv() => {} }
        });
        set.store(true, Ordering::Relaxed);
    });
    Ok(stop)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Run again in a terminal of its own by the integration tests; a panic must not leave
    /// the terminal in raw mode. Without a terminal there is nothing to give back.
    #[test]
    fn a_panic_gives_the_terminal_back() {
        if std::env::var_os("SPOKEGUARD_TEST_PANIC").is_some() {
            let _screen = Screen::open().expect("a terminal");
            panic!("on purpose");
        }
        let program = std::env::current_exe().expect("this program");
        let inner = format!(
            "SPOKEGUARD_TEST_PANIC=1 {} --exact cli::screen::tests::a_panic_gives_the_terminal_back --nocapture; stty -a",
            program.display()
        );
        let output = std::process::Command::new("script")
            .args(["-qec", &inner, "/dev/null"])
            .stdin(std::process::Stdio::null())
            .output();
        let Ok(output) = output else {
            let promised = std::env::var_os("CI").is_some();
            assert!(!promised, "script (of bsdutils) is needed");
            return;
        };
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let (entered, left) = (text.find("\x1b[?1049h"), text.rfind("\x1b[?1049l"));
        assert!(entered.is_some() && left > entered, "{text:?}");
        let told = text.find("on purpose").expect("the panic is told");
        assert!(
            text.find("\x1b[?1049l").is_some_and(|left| left < told),
            "told on the screen that goes: {text:?}"
        );
        assert!(
            text.contains(" icanon") && !text.contains("-icanon") && text.contains("\x1b[?25h"),
            "{text:?}"
        );
    }
}
