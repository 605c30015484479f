//! The front room: CSI messages in, domain calls out, and back. The only place that knows gRPC codes.
//!
//! Each method is parse, call, reply. What all of them share is in `call`: the volume's lock, the detached work, the
//! deadline, the one log line, the metrics. No back end is named here, and nothing is decided about storage.

mod call;
mod controller;
mod identity;
mod node;
mod parse;
mod reply;
mod status;
#[cfg(test)]
mod tests;

pub use call::Front;
pub(crate) use status::name as code_name;
