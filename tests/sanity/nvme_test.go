package sanity

// Local volumes. BERTH_NVME_DISKS names disks for the pools of this run, whose contents are lost; without it they are
// files on loop devices, which the kernel here has to have the right things for: project quotas and device mapper are
// in the virtual machine of scripts/test-vm.sh. BERTH_NVME_CLASS says what a volume is carved as.

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

var nvmeClass = os.Getenv("BERTH_NVME_CLASS")

// What only an image can. These specs need it, and no capability says so, since those are the driver's and not a class'.
var copies = []string{
	`from an existing source (snapshot|volume)`,
	`CreateSnapshot .*(already existing name|maximum-length name|accessibility requirements)`,
	`DeleteSnapshot .*appropriate values`,
	`GetSnapshot .*match the specified`,
	`ListSnapshots .*(match the specified|presence of new|next token)`,
}

func nvmeDriver() driver {
	d := driver{
		setup:     mountPool,
		leftovers: poolLeftovers,
		access:    []string{"mount", "block"},
		capabilities: []string{
			"controller CREATE_DELETE_VOLUME",
			"controller LIST_VOLUMES",
			"controller GET_CAPACITY",
			"controller CREATE_DELETE_SNAPSHOT",
			"controller LIST_SNAPSHOTS",
			"controller CLONE_VOLUME",
			"controller MODIFY_VOLUME",
			"controller GET_VOLUME",
			"controller GET_SNAPSHOT",
			"controller SINGLE_NODE_MULTI_WRITER",
			"controller GET_VOLUME_HEALTH",
			"controller LIST_VOLUME_HEALTH",
			"node STAGE_UNSTAGE_VOLUME",
			"node GET_VOLUME_STATS",
			"node EXPAND_VOLUME",
			"node SINGLE_NODE_MULTI_WRITER",
			"node GET_VOLUME_HEALTH",
			"node GET_STORAGE_HEALTH",
			"plugin CONTROLLER_SERVICE",
			"plugin VOLUME_ACCESSIBILITY_CONSTRAINTS",
			"plugin SNAPSHOT_ACCESSIBILITY_CONSTRAINTS",
			"plugin expansion ONLINE",
		},
	}
	if nvmeClass != "" {
		d.parameters = map[string]string{"carve": nvmeClass}
	}
	switch nvmeClass {
	case "directory":
		d.access = []string{"mount"}
		d.without = copies
	case "lvm":
		d.setup, d.leftovers = makeGroup, groupLeftovers
		// A node that has nothing but a volume group.
		d.capabilities = slices.DeleteFunc(d.capabilities, func(capability string) bool {
			return strings.Contains(capability, "SNAPSHOT") || strings.Contains(capability, "CLONE")
		})
	}
	return d
}

// The pool is a sparse file: what the volumes don't write takes no space.
const poolSize = 64 << 30

var disksInUse = map[string]bool{}

// takeDisk returns one of BERTH_NVME_DISKS that no other instance has, or a file where there are none.
func takeDisk(t *testing.T, i *instance) string {
	t.Helper()
	disks := strings.Fields(os.Getenv("BERTH_NVME_DISKS"))
	if len(disks) == 0 {
		image := i.path("pool.img")
		if err := os.WriteFile(image, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Truncate(image, poolSize); err != nil {
			t.Fatal(err)
		}
		return image
	}
	free := slices.IndexFunc(disks, func(disk string) bool { return !disksInUse[disk] })
	if free < 0 {
		t.Fatalf("all of %q are in use", disks)
	}
	disksInUse[disks[free]] = true
	t.Cleanup(func() { delete(disksInUse, disks[free]) })
	return disks[free]
}

func run(t *testing.T, command ...string) string {
	t.Helper()
	out, err := exec.CommandContext(interrupted, command[0], command[1:]...).CombinedOutput()
	if err != nil {
		t.Fatalf("%q: %v: %s", command, err, out)
	}
	return string(out)
}

// mountPool makes the XFS file system that nvme carves its volumes from. Reflinks are what snapshots need; mkfs.xfs
// has them on by default.
func mountPool(t *testing.T, i *instance) string {
	t.Helper()
	disk, pool := takeDisk(t, i), i.path("pool")
	if err := os.Mkdir(pool, 0o700); err != nil {
		t.Fatal(err)
	}
	run(t, "mkfs.xfs", "-q", "-f", disk)
	options := "loop"
	if strings.HasPrefix(disk, "/dev/") {
		options = "prjquota"
	}
	run(t, "mount", "-o", options, disk, pool)
	return "pools:\n  - {name: main, path: " + pool + "}\n"
}

// poolLeftovers lists mounts of volumes, loop devices on them, and whatever the pool still stores.
func poolLeftovers(t *testing.T, i *instance) []string {
	var left []string
	pool := i.path("pool")
	for _, mount := range mountsBeneath(t, i.dir) {
		if mount != pool {
			left = append(left, "mount "+mount)
		}
	}
	for device, file := range loopsBeneath(t, pool) {
		left = append(left, "loop device "+device+" on "+file)
	}
	for _, name := range []string{"volumes", "snapshots", "trash", "tmp"} {
		entries, err := os.ReadDir(filepath.Join(pool, name))
		if err != nil { // one that does not exist would mean that we look in the wrong place
			left = append(left, err.Error())
		}
		for _, entry := range entries {
			left = append(left, filepath.Join(pool, name, entry.Name()))
		}
	}
	return left
}

// group is the volume group of an instance.
func group(i *instance) string { return filepath.Base(i.dir) }

// makeGroup makes the volume group that nvme carves its volumes from, as an administrator would.
func makeGroup(t *testing.T, i *instance) string {
	t.Helper()
	disk := takeDisk(t, i)
	run(t, "wipefs", "-q", "-a", disk)
	run(t, "pvcreate", "-q", disk)
	run(t, "vgcreate", "-q", group(i), disk)
	t.Cleanup(func() {
		// Only what still has mounts, after a failure, is not removed by the one command.
		for _, mount := range slices.Backward(mountsBeneath(t, i.dir)) {
			exec.Command("umount", mount).Run()
		}
		for _, command := range [][]string{{"vgremove", "-q", "-ff", "-y", group(i)}, {"pvremove", "-q", "-y", disk}} {
			if out, err := exec.Command(command[0], command[1:]...).CombinedOutput(); err != nil {
				t.Errorf("%q: %v: %s", command, err, out)
			}
		}
	})
	return fmt.Sprintf("pools:\n  - {name: main, group: %s}\n", group(i))
}

// groupLeftovers lists mounts of volumes, and whatever is in the group.
func groupLeftovers(t *testing.T, i *instance) []string {
	var left []string
	for _, mount := range mountsBeneath(t, i.dir) {
		left = append(left, "mount "+mount)
	}
	for _, volume := range strings.Fields(run(t, "lvs", "--noheadings", "-o", "lv_name", group(i))) {
		left = append(left, "logical volume "+volume)
	}
	return left
}
