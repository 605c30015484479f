//! The commands that a person types.

pub mod serve;

use std::path::PathBuf;

use clap::{Parser, Subcommand};

/// Storage for ML platforms on Kubernetes: a Container Storage Interface driver.
#[derive(Debug, Parser)]
#[command(version, about)]
pub struct Arguments {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run the drivers of a configuration file until SIGTERM.
    Serve {
        /// The YAML file; docs/configuration.md describes it.
        #[arg(long, value_name = "FILE")]
        config: PathBuf,
    },
    /// Look at a configuration file.
    #[command(subcommand)]
    Config(ConfigCommand),
}

/// What to do with a configuration file.
#[derive(Debug, Subcommand)]
pub enum ConfigCommand {
    /// Say every mistake in it, with what would be right; exit 1 if there is one.
    Check {
        /// The YAML file.
        file: PathBuf,
    },
}
