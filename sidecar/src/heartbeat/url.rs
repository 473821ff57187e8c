//! The files that hold a URL: read strictly, so that a slip is told before it is sent somewhere.

use crate::terms::Secret;

const BYTES_MAX: usize = 2048;

/// Why the text is no URL that we would send to. Says nothing of the text itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UrlError {
    #[error("it is empty: write the URL on its first line")]
    Empty,
    #[error("its first line is longer than {BYTES_MAX} bytes")]
    TooLong,
    #[error("its first line has a space, or a character that no URL has")]
    Character,
    #[error("its first line does not begin with https:// or http://")]
    Scheme,
    #[error("its first line names no host")]
    Host,
    #[error("its URL has a user in front of the host: write an access token on a line of its own")]
    User,
    #[error("its URL ends with no topic of 1 to 64 letters, digits, - and _")]
    Topic,
    #[error("its second line is no access token (tk_...)")]
    Token,
    #[error("its URL has no path: write it as Uptime Kuma shows it, with /api/push/ and the token")]
    Path,
}

/// The first line, taken apart.
pub(super) struct Url<'a> {
    /// `https://host:port`
    pub(super) origin: &'a str,
    /// From the first slash on; empty where there is none.
    pub(super) path: &'a str,
}

pub(super) fn parse(text: &str) -> Result<(Url<'_>, Option<Secret>), UrlError> {
    let mut lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    let line = lines.next().ok_or(UrlError::Empty)?;
    let second = lines.next().map(|line| Secret::new(line.to_owned()));
    if line.len() > BYTES_MAX {
        return Err(UrlError::TooLong);
    }
    if !line.bytes().all(|byte| byte.is_ascii_graphic() && !matches!(byte, b'"' | b'<' | b'>' | b'\\' | b'`'))
    {
        return Err(UrlError::Character);
    }
    let scheme = ["https://", "http://"].into_iter().find(|scheme| line.starts_with(scheme));
    let after = scheme.ok_or(UrlError::Scheme)?.len();
    // Kuma shows its URL with a query of examples; ours is another.
    let end = line.find(['?', '#']).unwrap_or(line.len());
    let slash = line[after..end].find('/').map_or(end, |at| after + at);
    let (origin, path) = (&line[..slash], &line[slash..end]);
    let host = &origin[after..];
    if host.contains('@') {
        return Err(UrlError::User);
    }
    if host.is_empty() || host.starts_with(':') {
        return Err(UrlError::Host);
    }
    Ok((Url { origin, path }, second))
}
