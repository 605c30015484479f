//! What kubelet asks of a driver on a node: stage at a path of its own, publish at the user's, and back.
//!
//! The staging layout is kubelet's, in a folder that is not kubelet's: the two never meet.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use sha2::{Digest, Sha256};

use super::client::{Access, Client, ControllerCan, NodeCan, limited, range, refused};
use crate::backend::STAGED_DEVICE;
use crate::host::mounts;
use crate::proto::csi;

/// Where volumes are staged unless `--staging` says otherwise.
pub(super) const STAGING: &str = "/var/lib/berth/staging";

/// A client, and where on this node it stages.
pub(super) struct Kubelet<'a> {
    pub(super) client: &'a Client,
    pub(super) staging: &'a Path,
    /// As a class's node-stage and node-publish secrets.
    pub(super) secrets: HashMap<String, String>,
}

/// The path as drivers want it: absolute, with no symbolic link before its last part.
pub(super) fn absolute(path: &Path) -> Result<PathBuf> {
    let what = || format!("cannot use {} as a path", path.display());
    let path = std::path::absolute(path).with_context(what)?;
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        bail!("cannot use {} as a path: name one below it", path.display());
    };
    Ok(parent.canonicalize().unwrap_or_else(|_| parent.to_owned()).join(name))
}

fn text<'p>(what: &str, path: &'p Path) -> Result<&'p str> {
    path.to_str().with_context(|| format!("cannot use {} as the {what}: CSI takes only UTF-8", path.display()))
}

impl Kubelet<'_> {
    /// Where a volume is staged: one folder for each driver, and in it one for each volume.
    pub(super) fn staging_path(&self, id: &str) -> PathBuf {
        let digest: String = Sha256::digest(id.as_bytes()).iter().map(|byte| format!("{byte:02x}")).collect();
        self.staging.join(&self.client.driver).join(digest).join("globalmount")
    }

    /// Where a volume that is staged here is published.
    pub(super) fn published(&self, id: &str) -> Result<Vec<PathBuf>> {
        let staging = self.staging_path(id);
        let source = if mounts::is_mount(&staging)? { staging } else { staging.join(STAGED_DEVICE) };
        Ok(mounts::binds_of(&source)?)
    }

    /// NodeStageVolume and NodePublishVolume; the path that it is at. What was half done is undone.
    pub(super) async fn mount(&self, id: &str, target: &Path, access: &Access, read_only: bool) -> Result<PathBuf> {
        // Before anything is made.
        self.client.node()?;
        let volume = self.client.volume(id).await?;
        let (target, staging) = (absolute(target)?, self.staging_path(id));
        for path in [&target, &staging] {
            if let Some(parent) = path.parent() {
                std::fs::create_dir_all(parent).with_context(|| format!("cannot make {}", parent.display()))?;
            }
        }
        // Again: its parent may just have been made behind a link.
        let target = absolute(&target)?;
        if let Err(error) = self.stage_and_publish(volume, &staging, &target, access, read_only).await {
            if self.published(id).is_ok_and(|places| places.is_empty()) {
                // The first failure is the one to tell about.
                let _ = self.unstage(id).await;
            }
            return Err(error);
        }
        Ok(target)
    }

    async fn stage_and_publish(
        &self,
        volume: csi::Volume,
        staging: &Path,
        target: &Path,
        access: &Access,
        read_only: bool,
    ) -> Result<()> {
        let id = volume.volume_id;
        let capability = self.client.capability(access);
        let staging_target_path = if self.client.node_can(NodeCan::StageUnstageVolume) {
            let request = csi::NodeStageVolumeRequest {
                volume_id: id.clone(),
                staging_target_path: text("staging path", staging)?.to_owned(),
                volume_capability: Some(capability.clone()),
                volume_context: volume.volume_context.clone(),
                secrets: self.secrets.clone(),
                ..csi::NodeStageVolumeRequest::default()
            };
            let staged = self.client.node()?.node_stage_volume(limited(request.clone())).await;
            staged.map_err(refused(format!("cannot stage {id}")))?;
            request.staging_target_path
        } else {
            String::new()
        };
        let request = csi::NodePublishVolumeRequest {
            volume_id: id.clone(),
            staging_target_path,
            target_path: text("target path", target)?.to_owned(),
            volume_capability: Some(capability),
            readonly: read_only,
            volume_context: volume.volume_context,
            secrets: self.secrets.clone(),
            ..csi::NodePublishVolumeRequest::default()
        };
        let published = self.client.node()?.node_publish_volume(limited(request)).await;
        published.map(drop).map_err(refused(format!("cannot mount {id} at {}", target.display())))
    }

    /// NodeUnpublishVolume, and NodeUnstageVolume when that was the last place.
    pub(super) async fn unmount(&self, id: &str, target: &Path) -> Result<()> {
        let request = csi::NodeUnpublishVolumeRequest {
            volume_id: id.to_owned(),
            target_path: text("target path", target)?.to_owned(),
        };
        let gone = self.client.node()?.node_unpublish_volume(limited(request)).await;
        gone.map_err(refused(format!("cannot unmount {id} from {}", target.display())))?;
        if self.published(id)?.is_empty() { self.unstage(id).await } else { Ok(()) }
    }

    /// NodeUnstageVolume, and the folders that staging needed.
    pub(super) async fn unstage(&self, id: &str) -> Result<()> {
        let staging = self.staging_path(id);
        if self.client.node_can(NodeCan::StageUnstageVolume) {
            let request = csi::NodeUnstageVolumeRequest {
                volume_id: id.to_owned(),
                staging_target_path: text("staging path", &staging)?.to_owned(),
            };
            let gone = self.client.node()?.node_unstage_volume(limited(request)).await;
            gone.map_err(refused(format!("cannot unstage {id}")))?;
        }
        for folder in staging.ancestors().take_while(|folder| *folder != self.staging) {
            // Only what is empty goes: other volumes may be staged beside it.
            let _ = std::fs::remove_dir(folder);
        }
        Ok(())
    }

    /// Grows a volume that is mounted at `target` to at least `size` bytes; its size afterwards.
    pub(super) async fn grow(&self, id: &str, target: &Path, size: u64) -> Result<u64> {
        let what = format!("cannot grow {id}");
        self.client.node()?;
        let access = if target.is_dir() {
            Access::Mount { filesystem: String::new(), options: Vec::new() }
        } else {
            Access::Block
        };
        let capability = self.client.capability(&access);
        let (mut grown, mut node_too) = (0, self.client.node_can(NodeCan::ExpandVolume));
        if self.client.controller_can(ControllerCan::ExpandVolume) {
            let request = csi::ControllerExpandVolumeRequest {
                volume_id: id.to_owned(),
                capacity_range: Some(range(size)?),
                volume_capability: Some(capability.clone()),
                ..csi::ControllerExpandVolumeRequest::default()
            };
            let reply = self.client.controller().controller_expand_volume(limited(request)).await;
            let reply = reply.map_err(refused(what.clone()))?.into_inner();
            (grown, node_too) = (reply.capacity_bytes, reply.node_expansion_required && node_too);
        } else if !node_too {
            bail!("{what}: driver {} does not grow volumes", self.client.driver);
        }
        if node_too {
            let staging = self.staging_path(id);
            let request = csi::NodeExpandVolumeRequest {
                volume_id: id.to_owned(),
                volume_path: text("volume path", target)?.to_owned(),
                capacity_range: Some(range(size)?),
                // It may have been staged elsewhere.
                staging_target_path: if staging.exists() {
                    text("staging path", &staging)?.to_owned()
                } else {
                    String::new()
                },
                volume_capability: Some(capability),
                ..csi::NodeExpandVolumeRequest::default()
            };
            let reply = self.client.node()?.node_expand_volume(limited(request)).await;
            grown = reply.map_err(refused(what))?.into_inner().capacity_bytes;
        }
        Ok(u64::try_from(grown).unwrap_or_default().max(size))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_made_absolute_and_free_of_links() {
        let dir = tempfile::tempdir().unwrap();
        let real = dir.path().canonicalize().unwrap();
        std::os::unix::fs::symlink(&real, real.join("link")).unwrap();
        assert_eq!(absolute(&real.join("link/data")).unwrap(), real.join("data"));
        assert_eq!(absolute(&real.join("new/data/")).unwrap(), real.join("new/data"));
        assert_eq!(absolute(Path::new("data")).unwrap(), std::env::current_dir().unwrap().join("data"));
        assert!(absolute(Path::new("/")).is_err());
    }
}
