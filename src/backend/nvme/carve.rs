//! Which carve a volume gets.

use super::parameters::{ClassParameters, Wanted};
use crate::config::Carve;
use crate::error::Result;
use crate::host::filesystem::Kind;

/// Can a volume of this carve be what is asked for?
///
/// # Errors
/// `Invalid`, with what it can't be.
pub(super) fn check(carve: Carve, wanted: Wanted, class: &ClassParameters, attributes_only: bool) -> Result<()> {
    let only_lvm = class.encryption.is_some() || class.stripes.is_some();
    if only_lvm && carve != Carve::Lvm {
        fail!(Invalid, "a volume of the carve {} has no encryption and no stripes: the carve lvm has", carve.name());
    }
    if carve != Carve::Directory {
        return Ok(());
    }
    let cannot = match wanted {
        Wanted::Block => "be a block device",
        Wanted::Mount(Some(Kind::Ext4)) => "be ext4: it is a part of the pool's XFS",
        _ if !class.mkfs_options.is_empty() => "have mkfs options: no file system is made for it alone",
        _ if !attributes_only => "have mount options of a file system: it is a part of the pool's",
        _ if !class.limits.is_none() => "have limits of I/O: they would hold for all directories of its disk",
        _ => return Ok(()),
    };
    fail!(Invalid, "a volume of the carve directory can't {cannot}. The carve image can")
}

/// The carve of a new volume in a pool that offers some: the class' own, or what the pool is best at and can be what is
/// asked for. `None`: the pool does not offer it.
pub(super) fn choose(
    offers: impl Fn(Carve) -> bool,
    wanted: Wanted,
    class: &ClassParameters,
    attributes_only: bool,
) -> Option<Carve> {
    let usual = [Carve::Directory, Carve::Lvm, Carve::Image];
    let named = class.carve.as_ref().map_or(&usual[..], std::slice::from_ref);
    let mut possible = named.iter().filter(|carve| check(**carve, wanted, class, attributes_only).is_ok());
    possible.find(|carve| offers(**carve)).copied()
}
