//! Bad luck: a clear error, nothing lost, nothing left behind, and everything else goes on.
#![allow(clippy::disallowed_methods, clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod common;

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

use berth::proto::csi;
use common::{Client, GI, Lab, MI, Use, is_root, map, read, refused, run, write};
use tonic::Code;

/// > A damaged descriptor makes its own volume abnormal, and no other.
#[tokio::test]
async fn a_damaged_descriptor_harms_its_own_volume_only() {
    skip_unless!(is_root(), "needs root");
    let (mut lab, client) = Lab::on("xfs", 8 * GI).await;
    let good = client.make_and_mount(&lab, "good", GI, &Use::default()).await;
    let bad = client.create("bad", GI, &Use::default()).await;
    let descriptor = lab.pool().join("volumes").join(&bad).join("volume.json");
    let right = read(&descriptor);
    for damage in [&b""[..], b"{", b"\0\0\0\0", b"{\"version\": 2}", &right[..right.len() / 2]] {
        std::fs::write(&descriptor, damage).unwrap();
        let client = lab.restart().await;
        assert_eq!(client.health(&bad).await.unwrap(), ["DescriptorDamaged"]);
        assert_eq!(client.health(&good.id).await.unwrap(), [""; 0]);
        let message = refused(client.stage(&bad, &lab.staging("bad"), &Use::default()).await, Code::Internal);
        assert!(message.contains("volume.json"), "{message}");
        refused(client.try_create(Client::request("bad", GI, &Use::default())).await, Code::Internal);
        assert_eq!(client.list().await.len(), 2);
        let unwell = csi::ControllerListVolumeHealthRequest::default();
        let unwell = client.controller.clone().controller_list_volume_health(unwell).await.unwrap().into_inner();
        assert_eq!(unwell.entries.len(), 1);
        assert_eq!(unwell.entries[0].volume_id, bad);
        write(good.file("f"), "works");
        let more = client.create("more", GI, &Use::default()).await;
        client.delete(&more).await.unwrap();
        // Its bytes are still promised.
        assert!(client.capacity().await.available_capacity < 6 * GI);
    }
    // Put right by hand, it is well again.
    std::fs::write(&descriptor, &right).unwrap();
    let client = lab.restart().await;
    assert_eq!(client.health(&bad).await.unwrap(), [""; 0]);
    // The descriptor of another volume: a person has to look.
    std::fs::copy(lab.pool().join("volumes").join(&good.id).join("volume.json"), &descriptor).unwrap();
    refused(client.delete(&bad).await, Code::Internal);
    // No descriptor at all: the orchestrator may still be rid of it.
    std::fs::remove_file(&descriptor).unwrap();
    client.delete(&bad).await.unwrap();
    client.remove(&good).await;
    lab.assert_clean();
}

/// > An image that vanished is reported as data loss; what is left of its volume can still be taken away.
#[tokio::test]
async fn a_vanished_image_is_reported_and_can_be_taken_away() {
    skip_unless!(is_root(), "needs root");
    let (lab, client) = Lab::on("xfs", 8 * GI).await;
    let mounted = client.make_and_mount(&lab, "a", GI, &Use::default()).await;
    let second = client.create("b", GI, &Use::default()).await;
    let image = |id: &str| lab.pool().join("volumes").join(id).join("image");
    std::fs::remove_file(image(&mounted.id)).unwrap();
    std::fs::File::options().write(true).open(image(&second)).unwrap().set_len(4096).unwrap();
    assert_eq!(client.health(&mounted.id).await.unwrap(), ["ImageMissing"]);
    assert_eq!(client.health(&second).await.unwrap(), ["ImageTruncated"]);
    refused(client.stage(&mounted.id, &lab.staging("x"), &Use::default()).await, Code::Internal);
    client.unmount(&mounted).await;
    assert_eq!(lab.mounts(), Vec::<String>::new());
    client.delete(&mounted.id).await.unwrap();
    client.delete(&second).await.unwrap();
    // The device of a block volume is held by nobody but us.
    let block = client.make_and_mount(&lab, "block", GI, &Use::block()).await;
    std::fs::remove_file(image(&block.id)).unwrap();
    client.remove(&block).await;
    lab.assert_clean();
    let deleted = run("losetup", &["-a"]).lines().filter(|line| line.contains(&block.id)).count();
    assert_eq!(deleted, 0);
}

/// > A blank volume is formatted once; what holds anything is never formatted.
#[tokio::test]
async fn only_what_is_positively_blank_is_formatted() {
    skip_unless!(is_root(), "needs root");
    let (lab, client) = Lab::on("xfs", 4 * GI).await;
    let id = client.create("a", GI, &Use::default()).await;
    let image = lab.pool().join("volumes").join(&id).join("image");
    let file = std::fs::File::options().write(true).open(&image).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, b"somebody's data", 500 << 20).unwrap();
    file.sync_all().unwrap();
    let message = refused(client.stage(&id, &lab.staging("a"), &Use::default()).await, Code::FailedPrecondition);
    assert!(message.contains("not formatting"), "{message}");
    let mut bytes = [0; 15];
    std::os::unix::fs::FileExt::read_exact_at(&std::fs::File::open(&image).unwrap(), &mut bytes, 500 << 20).unwrap();
    assert_eq!(&bytes, b"somebody's data");
    lab.assert_no_places();
    client.delete(&id).await.unwrap();
    // A mkfs that was interrupted is begun anew, on an image with nothing left of it.
    let id = client.create("c", GI, &Use::fs("ext4")).await;
    let folder = lab.pool().join("volumes").join(&id);
    let descriptor =
        std::fs::read_to_string(folder.join("volume.json")).unwrap().replace("\"blank\"", "\"formatting\"");
    std::fs::write(folder.join("volume.json"), &descriptor).unwrap();
    assert!(descriptor.contains("formatting"));
    let file = std::fs::File::options().read(true).write(true).open(folder.join("image")).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, b"half a file system", 900 << 20).unwrap();
    file.sync_all().unwrap();
    let mounted = client.mount(&lab, &id, "c", &Use::fs("ext4")).await;
    client.unmount(&mounted).await;
    let mut bytes = [1; 18];
    std::os::unix::fs::FileExt::read_exact_at(&file, &mut bytes, 900 << 20).unwrap();
    assert_eq!(bytes, [0; 18]);
    client.delete(&id).await.unwrap();
    // A file system that can't be mounted is an error, not a reason for a new one.
    let mounted = client.make_and_mount(&lab, "b", GI, &Use::fs("ext4")).await;
    client.unmount(&mounted).await;
    let image = lab.pool().join("volumes").join(&mounted.id).join("image");
    let file = std::fs::File::options().write(true).open(&image).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &[0; 8192], 0).unwrap();
    file.sync_all().unwrap();
    let message = refused(client.stage(&mounted.id, &mounted.staging, &Use::default()).await, Code::Internal);
    assert!(message.contains("ext4"), "{message}");
    let mut bytes = [1; 8192];
    std::os::unix::fs::FileExt::read_exact_at(&std::fs::File::open(&image).unwrap(), &mut bytes, 0).unwrap();
    assert_eq!(bytes, [0; 8192]);
    client.delete(&mounted.id).await.unwrap();
    lab.assert_clean();
}

/// > A pool that is missing, read-only or full is reported, gives no room, and is used again when it is back.
#[tokio::test]
async fn a_pool_may_be_missing_read_only_or_full() {
    skip_unless!(is_root(), "needs root");
    let mut lab = Lab::without_driver("xfs", 4 * GI);
    let pool = lab.pool().to_str().unwrap().to_owned();
    common::unmount(&[&pool]);
    // The disk is not mounted: the directory below lies on the root disk, or is not there at all.
    let client = lab.start().await;
    assert_eq!(client.storage_health().await.len(), 1);
    assert_eq!(client.capacity().await.available_capacity, 0);
    refused(client.try_create(Client::request("a", GI, &Use::default())).await, Code::ResourceExhausted);
    std::fs::remove_dir(&pool).unwrap();
    assert_eq!(client.storage_health().await, ["PoolMissing"]);
    refused(client.try_create(Client::request("a", GI, &Use::default())).await, Code::ResourceExhausted);
    lab.mount_pool("pool");
    assert_eq!(client.storage_health().await, [""; 0]);
    let id = client.create("a", GI, &Use::default()).await;
    common::unmount(&[&pool]);
    refused(client.delete(&id).await, Code::Unavailable);
    refused(client.stage(&id, &lab.staging("a"), &Use::default()).await, Code::Unavailable);
    run("mount", &["-o", "loop,ro", lab.path("pool.img").to_str().unwrap(), &pool]);
    assert_eq!(client.storage_health().await, ["PoolReadOnly"]);
    assert_eq!(client.health(&id).await.unwrap(), ["PoolReadOnly"]);
    assert_eq!(client.list().await, [id.as_str()]);
    refused(client.try_create(Client::request("b", GI, &Use::default())).await, Code::ResourceExhausted);
    refused(client.delete(&id).await, Code::ResourceExhausted);
    common::unmount(&[&pool]);
    lab.mount_pool("pool");
    // Full by somebody else's hand: refused, and nothing half-made stays.
    let before = client.capacity().await.available_capacity;
    run("fallocate", &["-l", &(before - 100 * MI).to_string(), &format!("{pool}/stranger")]);
    refused(client.try_create(Client::request("b", GI, &Use::default())).await, Code::ResourceExhausted);
    assert_eq!(lab.entries("volumes").len(), 1);
    assert_eq!(lab.entries("tmp").len(), 0);
    std::fs::remove_file(format!("{pool}/stranger")).unwrap();
    let free = run("df", &["--output=avail", "-B1", &pool]).lines().last().unwrap().trim().parse::<i64>().unwrap();
    run("fallocate", &["-l", &(free - MI).to_string(), &format!("{pool}/stranger")]);
    assert_eq!(client.storage_health().await, ["PoolFull"]);
    std::fs::remove_file(format!("{pool}/stranger")).unwrap();
    client.delete(&id).await.unwrap();
    lab.assert_clean();
}

/// > A pool that is missing holds up no volume of another pool, and no pod's end.
#[tokio::test]
async fn a_missing_pool_holds_up_no_other() {
    skip_unless!(is_root(), "needs root");
    let mut lab = Lab::without_driver("xfs", 4 * GI);
    let gone = lab.path("gone");
    std::fs::create_dir(&gone).unwrap();
    lab.config.pool = format!("{}\n  - {{name: gone, path: {}}}", lab.config.pool, gone.display());
    std::fs::remove_dir(&gone).unwrap();
    let client = lab.start().await;
    assert_eq!(client.storage_health().await, ["PoolMissing"]);
    let mounted = client.make_and_mount(&lab, "a", GI, &Use::default()).await;
    client.remove(&mounted).await;
    let target = lab.target("inline");
    let mut request = Client::publication("csi-1", "", &target, &Use::default());
    request.volume_context = map(&[("csi.storage.k8s.io/ephemeral", "true"), ("size", "1Gi")]);
    client.node.clone().node_publish_volume(request).await.unwrap();
    client.unpublish("csi-1", &target).await.unwrap();
    client.unpublish("csi-unknown", &target).await.unwrap();
    lab.assert_clean();
}

/// > What a driver that died has left frozen its successor thaws, whatever other pools are in trouble.
#[tokio::test]
async fn what_was_left_frozen_is_thawed() {
    skip_unless!(is_root(), "needs root");
    let mut lab = Lab::without_driver("xfs", 4 * GI);
    let healthy = lab.config.pool.clone();
    let client = lab.start().await;
    let mounted = client.make_and_mount(&lab, "a", GI, &Use::fs("xfs")).await;
    lab.kill();
    // As if it had died between the two calls of an expansion.
    let mark = lab.pool().join("volumes").join(&mounted.id).join("frozen");
    std::fs::write(&mark, "").unwrap();
    run("fsfreeze", &["-f", &mounted.staging]);
    lab.config.pool = format!("{{name: gone, path: {}}}\n  - {healthy}", lab.path("gone").display());
    let client = lab.start().await;
    let end = Instant::now() + Duration::from_secs(20);
    while mark.exists() {
        if Instant::now() > end {
            // Else nothing that touches it would ever end.
            run("fsfreeze", &["-u", &mounted.staging]);
            panic!("it is still frozen");
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    write(mounted.file("f"), "works");
    // Without a mark it is somebody else's: expanding fails, and leaves no mark that would thaw it.
    run("fsfreeze", &["-f", &mounted.staging]);
    let expanded = client.expand(&mounted.id, &mounted.target, GI).await;
    run("fsfreeze", &["-u", &mounted.staging]);
    refused(expanded, Code::Internal);
    assert!(!mark.exists());
    client.remove(&mounted).await;
    lab.assert_clean();
}

/// > Another disk at a pool's path is looked at anew.
#[tokio::test]
async fn another_disk_at_the_pools_path_is_looked_at_anew() {
    skip_unless!(is_root(), "needs root");
    let (lab, client) = Lab::on("xfs", 4 * GI).await;
    let first = client.create("a", GI, &Use::default()).await;
    let pool = lab.pool().to_str().unwrap().to_owned();
    common::unmount(&[&pool]);
    std::fs::rename(lab.path("pool.img"), lab.path("first.img")).unwrap();
    lab.make_pool("pool", "xfs", 8 * GI);
    let second = client.create("b", 2 * GI, &Use::default()).await;
    assert_eq!(client.list().await, [second.as_str()]);
    common::unmount(&[&pool]);
    run("mount", &["-o", "loop", lab.path("first.img").to_str().unwrap(), &pool]);
    assert_eq!(client.list().await, [first.as_str()]);
    assert!(client.capacity().await.available_capacity < 3 * GI);
    client.delete(&first).await.unwrap();
    lab.assert_clean();
}

/// > On the root disk there is no room unless the configuration says `fallback: root`.
#[tokio::test]
async fn the_root_disk_is_used_only_where_the_admin_says_so() {
    skip_unless!(is_root(), "needs root");
    let mut lab = Lab::bare();
    let probe = Path::new("/var/tmp");
    let same = |path: &Path| std::os::unix::fs::MetadataExt::dev(&std::fs::metadata(path).unwrap());
    skip_unless!(same(probe) == same(Path::new("/")), "/var/tmp is not on the root disk");
    let dir = tempfile::Builder::new().prefix("berth-").tempdir_in(probe).unwrap();
    lab.config.pool = format!("{{name: main, path: {}}}", dir.path().display());
    let client = lab.start().await;
    assert_eq!(client.capacity().await.available_capacity, 0);
    assert_eq!(client.storage_health().await, ["PoolOnRootDisk"]);
    let message = refused(client.try_create(Client::request("a", GI, &Use::default())).await, Code::ResourceExhausted);
    assert!(message.contains("fallback: root"), "{message}");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);

    lab.config.pool = format!("{{name: main, path: {}, cap: 64Mi, fallback: root}}", dir.path().display());
    let client = lab.restart().await;
    assert_eq!(client.storage_health().await, [""; 0]);
    assert_eq!(client.capacity().await.available_capacity, 64 * MI);
    refused(client.try_create(Client::request("a", 65 * MI, &Use::default())).await, Code::ResourceExhausted);
    let mounted = client.make_and_mount(&lab, "a", 64 * MI, &Use::default()).await;
    write(mounted.file("f"), "x");
    client.remove(&mounted).await;
    assert_eq!(client.capacity().await.available_capacity, 64 * MI);
}

/// > An unstaging that never came does not stand in the way of the next volume at that path.
#[tokio::test]
async fn a_forgotten_unstaging_is_made_up_for() {
    skip_unless!(is_root(), "needs root");
    let (mut lab, client) = Lab::on("xfs", 8 * GI).await;
    let first = client.make_and_mount(&lab, "a", GI, &Use::default()).await;
    write(first.file("f"), "a's");
    client.unpublish(&first.id, &first.target).await.unwrap();
    let client = lab.restart().await;
    // Another volume at the same path.
    let second = client.create("b", GI, &Use::default()).await;
    client.stage(&second, &first.staging, &Use::default()).await.unwrap();
    client.publish(&second, &first.staging, &first.target, &Use::default()).await.unwrap();
    write(first.file("f"), "b's");
    // The late call for the first one does not harm the second.
    client.unstage(&first.id, &first.staging).await.unwrap();
    refused(client.unpublish(&first.id, &first.target).await, Code::FailedPrecondition);
    assert_eq!(read(first.file("f")), b"b's");
    // Nor is a device at the path of one that was staged there before.
    let (one, two) = (client.create("c", GI, &Use::block()).await, client.create("d", GI, &Use::block()).await);
    let shared = lab.staging("shared");
    client.stage(&two, &shared, &Use::block()).await.unwrap();
    client.unstage(&one, &shared).await.unwrap();
    assert!(Path::new(&shared).join("device").exists());
    client.unstage(&two, &shared).await.unwrap();
    assert!(!Path::new(&shared).join("device").exists());
    for id in [one, two] {
        client.delete(&id).await.unwrap();
    }
    // The first one elsewhere, while it was never unstaged either.
    let elsewhere = client.mount(&lab, &first.id, "elsewhere", &Use::default()).await;
    assert_eq!(read(elsewhere.file("f")), b"a's");
    assert_eq!(lab.loops().len(), 2, "never two devices on one image");
    client.unpublish(&second, &first.target).await.unwrap();
    client.unstage(&second, &first.staging).await.unwrap();
    client.delete(&second).await.unwrap();
    client.remove(&elsewhere).await;
    lab.assert_clean();
}

/// > The same call twice at once ends in one volume and no error but "try again".
#[tokio::test]
async fn the_same_call_many_times_at_once_does_it_once() {
    skip_unless!(is_root(), "needs root");
    let (lab, client) = Lab::on("xfs", 8 * GI).await;
    let tolerate = |result: Result<(), tonic::Status>| match result {
        Ok(()) => 1,
        Err(status) => {
            assert_eq!(status.code(), Code::Aborted, "{status}");
            0
        }
    };
    for round in 0..3 {
        let name = format!("v{round}");
        let (staging, target) = (lab.staging(&name), lab.target(&name));
        let id = client.create(&name, GI, &Use::default()).await;
        for step in 0..6 {
            let mut calls = tokio::task::JoinSet::new();
            for _ in 0..16 {
                let (client, id, staging, target, name) =
                    (client.clone(), id.clone(), staging.clone(), target.clone(), name.clone());
                calls.spawn(async move {
                    match step {
                        0 => client.try_create(Client::request(&name, GI, &Use::default())).await.map(drop),
                        1 => client.stage(&id, &staging, &Use::default()).await,
                        2 => client.publish(&id, &staging, &target, &Use::default()).await,
                        3 => client.unpublish(&id, &target).await,
                        4 => client.unstage(&id, &staging).await,
                        _ => client.delete(&id).await,
                    }
                });
            }
            let mut done = 0;
            while let Some(result) = calls.join_next().await {
                done += tolerate(result.unwrap());
            }
            assert!(done > 0, "step {step}");
            assert_eq!(lab.loops().len(), usize::from((1..4).contains(&step)), "step {step}");
            assert_eq!(lab.mounts().len(), [0, 1, 2, 1, 0, 0][step], "step {step}");
        }
    }
    lab.assert_clean();
}

/// > A program that hangs is killed at its deadline; until it is gone its volume is locked, and no other volume is.
#[tokio::test]
async fn a_mkfs_that_hangs_holds_its_own_volume_only() {
    skip_unless!(is_root(), "needs root");
    let mut lab = Lab::without_driver("xfs", 8 * GI);
    lab.config.extra = "deadlines: {call: 1s, command: 8s, lock: 100ms}".to_owned();
    let programs = lab.path("programs");
    std::fs::create_dir(&programs).unwrap();
    let mkfs = programs.join("mkfs.ext4");
    std::fs::write(
        &mkfs,
        format!(
            "#!/bin/sh\ntrap '' TERM INT HUP\necho $$ > {}/pid\nwhile true; do sleep 1; done\n",
            programs.display()
        ),
    )
    .unwrap();
    std::fs::set_permissions(&mkfs, std::fs::Permissions::from_mode(0o755)).unwrap();
    let path = format!("{}:{}", programs.display(), std::env::var("PATH").unwrap());
    lab.environment.push(("PATH".to_owned(), path));
    let client = lab.start().await;

    let usage = Use::fs("ext4");
    let id = client.create("hangs", GI, &usage).await;
    let staging = lab.staging("hangs");
    let begun = Instant::now();
    refused(client.stage(&id, &staging, &usage).await, Code::DeadlineExceeded);
    // The caller was told in time; the work goes on, and owns the lock.
    refused(client.stage(&id, &staging, &usage).await, Code::Aborted);
    refused(client.delete(&id).await, Code::Aborted);
    let other = client.make_and_mount(&lab, "other", GI, &Use::fs("xfs")).await;
    write(other.file("f"), "works");
    client.remove(&other).await;
    // All that while mkfs hung.
    let pid = std::fs::read_to_string(programs.join("pid")).unwrap();
    assert!(Path::new(&format!("/proc/{}/exe", pid.trim())).exists());

    let end = begun + Duration::from_secs(30);
    std::fs::remove_file(&mkfs).unwrap();
    loop {
        match client.stage(&id, &staging, &usage).await {
            Ok(()) => break,
            Err(status) => assert!([Code::Aborted, Code::DeadlineExceeded].contains(&status.code()), "{status}"),
        }
        assert!(Instant::now() < end);
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert!(begun.elapsed() > Duration::from_secs(8));
    client.publish(&id, &staging, &lab.target("a"), &usage).await.unwrap();
    write(format!("{}/f", lab.target("a")), "works");
    client.unpublish(&id, &lab.target("a")).await.unwrap();
    client.unstage(&id, &staging).await.unwrap();
    client.delete(&id).await.unwrap();
    lab.assert_clean();
}

/// > A program that the driver started dies with it, so that its successor has the disk to itself.
#[tokio::test]
async fn a_mkfs_does_not_outlive_its_driver() {
    skip_unless!(is_root(), "needs root");
    let mut lab = Lab::without_driver("xfs", 4 * GI);
    let programs = lab.path("programs");
    std::fs::create_dir(&programs).unwrap();
    let mkfs = programs.join("mkfs.ext4");
    let begun = programs.join("begun");
    std::fs::write(&mkfs, format!("#!/bin/sh\necho $$ > {}\nexec sleep 60\n", begun.display())).unwrap();
    std::fs::set_permissions(&mkfs, std::fs::Permissions::from_mode(0o755)).unwrap();
    let path = format!("{}:{}", programs.display(), std::env::var("PATH").unwrap());
    lab.environment.push(("PATH".to_owned(), path));
    let client = lab.start().await;
    let usage = Use::fs("ext4");
    let id = client.create("a", GI, &usage).await;
    let staging = lab.staging("a");
    let call = tokio::spawn({
        let (client, id, staging, usage) = (client.clone(), id.clone(), staging.clone(), usage.clone());
        async move { client.stage(&id, &staging, &usage).await }
    });
    let end = Instant::now() + Duration::from_secs(20);
    let pid = loop {
        if let Some(pid) = std::fs::read_to_string(&begun).ok().and_then(|text| text.trim().parse::<u32>().ok()) {
            break pid;
        }
        assert!(Instant::now() < end);
        tokio::time::sleep(Duration::from_millis(10)).await;
    };
    lab.kill();
    assert!(call.await.unwrap().is_err());
    while Path::new(&format!("/proc/{pid}/exe")).exists() {
        assert!(Instant::now() < end, "mkfs goes on");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    std::fs::remove_file(&mkfs).unwrap();
    let client = lab.start().await;
    client.stage(&id, &staging, &usage).await.unwrap();
    client.unstage(&id, &staging).await.unwrap();
    client.delete(&id).await.unwrap();
    lab.assert_clean();
}

/// > A caller that leaves does not stop the work, and does not free the volume under it.
#[tokio::test]
async fn a_cancelled_call_is_finished_all_the_same() {
    skip_unless!(is_root(), "needs root");
    let (lab, client) = Lab::on("xfs", 8 * GI).await;
    for round in 0..12_u64 {
        let name = format!("v{round}");
        let id = client.create(&name, GI, &Use::default()).await;
        let staging = lab.staging(&name);
        // Cancelled at another point each time.
        let call = tokio::spawn({
            let (client, id, staging) = (client.clone(), id.clone(), staging.clone());
            async move { client.stage(&id, &staging, &Use::default()).await }
        });
        tokio::time::sleep(Duration::from_millis(round * 4)).await;
        call.abort();
        let mut tries = 0;
        while let Err(status) = client.stage(&id, &staging, &Use::default()).await {
            assert_eq!(status.code(), Code::Aborted, "{status}");
            tries += 1;
            assert!(tries < 50);
        }
        assert_eq!(lab.loops().len(), 1);
        client.unstage(&id, &staging).await.unwrap();
        client.delete(&id).await.unwrap();
    }
    lab.assert_clean();
}
