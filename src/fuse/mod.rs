//! The FUSE protocol, spoken by ourselves: a descriptor is served before and after INIT, answered from any task, parked
//! at a request boundary and resent. Knows nothing of objects.
//!
//! | part | owns | never |
//! |---|---|---|
//! | `abi` | numbers and structures of the protocol | |
//! | `request`, `reply` | bytes to operations, answers to bytes | touches the descriptor |
//! | `init` | what is agreed with the kernel | |
//! | `pool` | the buffers that requests are read into | |
//! | `reader` | the threads that read | answers, but for what is answered at once |
//! | `dispatch` | which method answers which operation | |
//! | `flight` | what is being answered, and interrupts | |
//! | [`Session`] | beginning, parking and end | |

mod abi;
mod dispatch;
pub mod filesystem;
mod flight;
mod init;
mod notify;
mod pool;
mod reader;
mod reply;
mod request;
mod session;
#[cfg(test)]
mod tests;

pub use filesystem::FileSystem;
pub use init::{Agreed, Options};
pub use session::{Ended, Parker, Session};
