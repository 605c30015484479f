//! The generated protocols. Only `server`, `rpc` and the command line's client know them.
#![allow(missing_docs, unreachable_pub, clippy::all, reason = "generated code")]

/// The Container Storage Interface, version 1.13.
pub mod csi {
    tonic::include_proto!("csi.v1");
}

/// Kubelet's plugin registration, version 1.
pub mod registration {
    tonic::include_proto!("pluginregistration");
}
