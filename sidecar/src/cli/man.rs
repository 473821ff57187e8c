//! `man`: the manual pages, from what `--help` says.

use std::path::PathBuf;

use anyhow::Context as _;
use clap::{Args, CommandFactory as _};

use super::{Cli, Global};

#[derive(Args)]
pub struct Options {
    /// Write every page into this directory: spokeguard.1 and one for each verb
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
}

pub fn run(global: &Global, options: &Options) -> anyhow::Result<u8> {
    let command = Cli::command();
    match &options.dir {
        Some(folder) => clap_mangen::generate_to(command, folder)
            .with_context(|| format!("write the manual pages into {}", folder.display()))?,
        None => {
            let mut text = Vec::new();
            clap_mangen::Man::new(command).render(&mut text)?;
            global.print(&String::from_utf8_lossy(&text))?;
        }
    }
    Ok(0)
}
