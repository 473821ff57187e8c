//! The life of the metrics server: a process of its own, which is given sockets and a text
//! and can get at nothing else. See [`super::front`].

use std::io;
use std::net::TcpListener;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::Instant;

use anyhow::Context as _;

use super::front::{ORDER_BYTES_MAX, Order, Word, receive, send};
use super::http::{Beat, Face, Server};
use super::privileges;
use crate::sys::memory;
use crate::sys::sockets::Readable;

/// What `ps` and findings call it.
const NAME: &std::ffi::CStr = c"spokeguard-http";
/// Connections, listeners, and a dozen of our own.
const DESCRIPTORS_MAX: u64 = 128;

/// Serves until the daemon ends. The channel is standard input.
pub fn run() -> anyhow::Result<()> {
    memory::limit_arenas();
    rustix::thread::set_name(NAME).context("name of the process")?;
    // A daemon that is killed leaves nobody who listens with its sockets.
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))
        .context("end with the daemon")?;
    let channel = rustix::io::dup(rustix::stdio::stdin()).context("the daemon's channel")?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("start the server's event loop")?;
    runtime.block_on(async {
        let channel = Readable::new(channel).context("the daemon's channel")?;
        let code = memory::OwnCode::find().ok();
        // Before the first byte of anybody else's.
        let confinement = privileges::confine_server(DESCRIPTORS_MAX);
        tell(&channel, &Word::Confined(confinement))?;
        serve(&channel, code).await.context("the daemon's channel")
    })
}

/// Until the daemon ends. What starting up has used of the code is let go of once there is
/// something to serve.
pub(super) async fn serve(channel: &Readable, mut code: Option<memory::OwnCode>) -> io::Result<()> {
    let face = Face::default();
    let mut server = Server::new(face.clone(), Vec::new());
    let mut buffer = vec![0; ORDER_BYTES_MAX];
    loop {
        tokio::select! {
            order = channel.take(|channel| receive_order(channel, &mut buffer)) => match order? {
                Some((order, along)) => {
                    let started = matches!(order, Order::Text(_));
                    obey(order, along, &face, &mut server)?;
                    if let Some(code) = code.take_if(|_| started) {
                        code.let_go();
                    }
                }
                None => return Ok(()),
            },
            () = face.wanted() => tell(channel, &Word::Ring { rejects: face.rejects() })?,
        }
    }
}

fn obey(order: Order, along: Option<OwnedFd>, face: &Face, server: &mut Server) -> io::Result<()> {
    match (order, along) {
        (Order::Clients(clients), None) => server.set_clients(clients),
        (Order::Listen(address), Some(listener)) => server.serve(address, TcpListener::from(listener))?,
        (Order::Close(address), None) => server.close(address),
        (Order::Text(text), None) => face.set(text),
        (Order::Beat(period), None) => face.set_health(Beat { at: Instant::now(), period }),
        _ => return Err(io::Error::other("an order with the wrong thing along")),
    }
    Ok(())
}

/// A daemon that is too busy to hear a ring rings no bell later: the next scrape does.
fn tell(channel: &Readable, word: &Word) -> io::Result<()> {
    match send(channel.descriptor(), &word.to_text(), None) {
        Err(error) if error.kind() != io::ErrorKind::WouldBlock => Err(error),
        _ => Ok(()),
    }
}

fn receive_order(channel: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<Option<(Order, Option<OwnedFd>)>> {
    let Some((length, along)) = receive(channel, buffer)? else { return Ok(None) };
    let text = buffer.get(..length).and_then(|bytes| std::str::from_utf8(bytes).ok());
    let order = text.and_then(Order::from_text).ok_or_else(|| io::Error::other("not an order"))?;
    Ok(Some((order, along)))
}
