//! The FUSE protocol, spoken by ourselves: a descriptor is served before and after INIT, answered from any task, parked
//! at a request boundary and resent. Knows nothing of objects.

pub mod filesystem;
